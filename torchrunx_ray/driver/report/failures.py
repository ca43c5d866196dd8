"""Failures of a run, and the one exception that the driver raises for them."""

import re
import signal
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchrunx_ray.driver.background import main_guard
from torchrunx_ray.driver.report import error_file, expired
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.report.missing_there import advice
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.errors import (
    AgentFailedError,
    LaunchError,
    LaunchTimeoutError,
    PayloadError,
    PreloadError,
    RemoteFailure,
    WorkerFailedError,
    describe_exit,
)
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.values.exceptions import load_exception


@dataclass(frozen=True)
class NotJoined:
    """Ranks, with their hosts, that had not joined the process group within its timeout."""

    timeout: float
    missing: Mapping[int, str]


@dataclass(frozen=True)
class ArgumentLost:
    """A value that an ObjectRef in the arguments refers to is lost."""

    evidence: str


@dataclass(frozen=True)
class DriverFailed:
    """The driver failed to handle an agent's message, which is a bug of this package."""

    doing: str
    error: BaseException

    @property
    def what(self) -> str:
        return f"the driver failed while it {self.doing}: {type(self.error).__name__}: {self.error}"


Report = (
    messages.Failed
    | messages.Died
    | messages.ScopeExpired
    | messages.AgentFailed
    | messages.TemplateRefused
    | NotJoined
    | ArgumentLost
    | DriverFailed
)

_FRAME = re.compile(r'^[ |]*File "(.+)", line (\d+), in (.+)$', re.MULTILINE)

_NOTICE_NS = 100_000_000
"""Longest time by which peers may notice a worker's death before the worker's parent does."""

_NOTICE_OF_SIGNAL_NS = 5_000_000_000
"""The same for a death by a signal, which no error of a peer causes. The machine may be busy."""


@dataclass(frozen=True)
class Failure:
    """One failure, with its time on the driver's clock."""

    time_ns: int
    hostname: str
    rank: int | None
    report: Report

    @property
    def who(self) -> str:
        return self.hostname if self.rank is None else f"rank {self.rank} on {self.hostname}"

    @property
    def what(self) -> str:
        return _summary(self.report)


@dataclass(frozen=True)
class Failures:
    """All failures of a run, and the ranks that the launch then stopped, with their stacks."""

    failures: Sequence[Failure]
    stopped: Sequence[str]
    stacks: Stacks
    """Stacks of the workers when the driver heard of the first failure."""
    log_directory: Path | None
    """Directory of the default files, if something was written to them."""
    stopped_at_ns: int | None = None
    """Time at which the launch began to stop the workers."""
    started: Collection[int] = ()
    """Ranks that had called the function."""
    attempts: Sequence[AttemptRecord] = ()
    """All attempts of the run, once the run has ended."""

    remark: str = ""
    """Reason why the run was not started again, if there is one to tell."""

    @property
    def may_go_away(self) -> bool:
        """True if new workers may succeed. An error from before the function would come again."""
        first = self.in_order()[0]
        match first.report:
            case messages.Failed(kind=kind, traceback=traceback):
                # Without a traceback, the value could not be sent; see `RemoteFailure`.
                return first.rank in self.started and (kind != "PayloadError" or bool(traceback))
            case messages.Died() | messages.ScopeExpired() | messages.AgentFailed() | NotJoined():
                return True
            case _:
                return False

    @property
    def kind(self) -> str:
        """Kind of the first failure, as in the agents' metrics."""
        match self.in_order()[0].report:
            case messages.Failed():
                return "exception"
            case messages.Died():
                return "death"
            case messages.ScopeExpired():
                return "watchdog"
            case messages.AgentFailed():
                return "agent"
            case NotJoined():
                return "timeout"
            case messages.TemplateRefused() | ArgumentLost() | DriverFailed():
                return "other"  # never restarted

    @property
    def first_ns(self) -> int:
        """Time of the first failure, on the driver's clock."""
        return self.in_order()[0].time_ns

    def have_own_cause(self, lost: Collection[str]) -> bool:
        """Return True if neither the loss of these hosts nor the stop of the workers explains the failures.

        An error in a collective is no cause by itself: a peer that is gone makes it. A process that ends on a lost
        host belongs to the loss, and whatever fails later may come of the loss. An exception of the function is a
        cause on any host.
        """
        for failure in self.in_order():
            if not self._was_before_stop(failure):
                return False
            match failure.report:
                case messages.Failed(in_collective=True):
                    continue
                case messages.Failed() as report if not _is_exit(report):
                    return True
                case _:
                    return failure.hostname not in lost
        return False

    @property
    def in_brief(self) -> str:
        first = self.in_order()[0]
        return f"{first.who}: {_summary(first.report)}{_where(first.report)}"

    @property
    def in_brief_with_logs(self) -> str:
        where = "" if self.log_directory is None else f"; logs in {self.log_directory}"
        return f"{self.in_brief}{where}"

    @cached_property
    def exception(self) -> BaseException:
        """The exception that the launch raises, made from the first failure.

        Its notes name later failures, and the ranks that the launch then stopped.
        """
        in_order = self.in_order()
        exceptions = [_exception(failure) for failure in in_order]
        first = exceptions[0]
        stacks = self._stacks_of_others
        if isinstance(first.__cause__, RemoteFailure):
            first.__cause__.failures = exceptions
            first.__cause__.stacks = str(stacks)
            first.__cause__.attempts = self.attempts
        if isinstance(first, LaunchError):
            first.attempts = self.attempts
        if isinstance(first, WorkerFailedError):
            first.stacks = str(stacks)
        for note in self.notes:
            _add_note(first, note)
        return first

    @property
    def notes(self) -> list[str]:
        """Remarks on the first failure: the later failures, the other ranks, and where the output is."""
        in_order = self.in_order()
        notes = _consequences(in_order)
        if not _is_exit(in_order[0].report):  # most exits are usage errors and need no notes
            if stacks := self._stacks_of_others:
                told = textwrap.indent(stacks.summary, "  ")
                notes.append(f"What the others were doing:\n{told}")
            if self.stopped:
                notes.append(f"Stopped by the launch after that: {', '.join(self.stopped)}.")
        if self.remark:
            notes.append(self.remark)
        if self.log_directory is not None:
            notes.append(f"All output of this launch: {self.log_directory}")
        return notes

    def in_order(self) -> list[Failure]:
        """Return the failures by time, but a cause before the peers' errors that it led to.

        An error of a peer may come first. The kernel closes a dying process's sockets before its parent can
        reap it. A function that destroys its process group in `finally` makes its peers fail before its own
        exception is reported.
        """
        in_order = sorted(self.failures, key=lambda failure: failure.time_ns)
        cause = self._kill_in_that_moment(in_order) or self._cause_of_error_in_collective(in_order)
        if cause is None:
            return in_order
        in_order.remove(cause)
        return [cause, *in_order]

    def _kill_in_that_moment(self, in_order: Sequence[Failure]) -> Failure | None:
        """Return a death by SIGKILL that was reported shortly after the first failure of a peer.

        Before the launch stops the workers, no worker's error leads to a SIGKILL. So the death is the cause, even
        if the peer's error does not show that: scripts may catch the error, and exit later.
        """
        first = in_order[0]
        if not isinstance(first.report, messages.Failed | messages.Died):
            return None
        for failure in in_order:
            if is_kill(failure.report) and self._was_before_stop(failure):
                return failure if failure.time_ns - first.time_ns < _NOTICE_NS else None
        return None

    def _cause_of_error_in_collective(self, in_order: Sequence[Failure]) -> Failure | None:
        """Return the cause of a first failure that is an error in a collective, else None.

        Prefers failures that were reported before the stop, and among them deaths: an exception may be what
        another peer made of its own error in a collective.
        """
        first, *later = in_order
        if not (isinstance(first.report, messages.Failed) and first.report.in_collective):
            return None
        causes = [each for each in later if self._may_have_caused(first, each)]
        before_stop = list(filter(self._was_before_stop, causes)) or causes
        deaths = [each for each in before_stop if _is_of_no_peer(each.report)]
        return next(iter(deaths or before_stop), None)

    def _was_before_stop(self, failure: Failure) -> bool:
        return self.stopped_at_ns is None or failure.time_ns <= self.stopped_at_ns

    def _may_have_caused(self, in_collective: Failure, failure: Failure) -> bool:
        """Return True if this failure, which was reported later, may have caused an error in a collective."""
        match failure.report:
            case messages.Failed(in_collective=also_in_collective):
                return self._was_before_stop(failure) and not also_in_collective
            case messages.Died(exited=exited) if exited.signal is not None:
                return failure.time_ns - in_collective.time_ns < self._notice_ns(failure, exited)
            # NotJoined: those who waited for a rank that does not come may give up a moment earlier.
            case messages.Died() | messages.ScopeExpired() | messages.AgentFailed() | NotJoined():
                return self._was_before_stop(failure)
            case _:
                return False

    def _notice_ns(self, failure: Failure, exited: messages.Exited) -> int:
        """Return how much later than its peers' errors a death by a signal may be reported."""
        # NCCL's watchdog aborts a process whose peers have failed. After the launch's SIGTERM a living
        # worker may crash, or be killed, while it shuts down.
        lived = failure.rank is not None and self.stacks.by_rank.get(failure.rank)
        was_told = not self._was_before_stop(failure)
        is_doubtful = exited.signal == signal.SIGABRT or (lived and was_told)
        return _NOTICE_NS if is_doubtful else _NOTICE_OF_SIGNAL_NS

    @property
    def _stacks_of_others(self) -> Stacks:
        """Stacks of the workers that have not failed."""
        return self.stacks.without(f.rank for f in self.failures if f.rank is not None)


def is_kill(report: Report) -> bool:
    """Return True if a SIGKILL has ended a worker. Before the launch stops the workers, no peer's error leads to one."""
    match report:
        case messages.Died(exited=exited):
            return exited.signal == signal.SIGKILL
        case messages.ScopeExpired():
            return report.signal == signal.SIGKILL
        case _:
            return False


def _exception(failure: Failure) -> BaseException:
    report, rank = failure.report, failure.rank
    match report:
        case messages.AgentFailed():
            return AgentFailedError(
                hostname=failure.hostname, what=report.what, evidence=report.evidence
            )
        case messages.TemplateRefused():
            return PreloadError(
                hostname=failure.hostname,
                problem=report.problem,
                advice=report.advice,
                evidence=report.evidence,
            )
        case NotJoined():
            return LaunchTimeoutError(timeout=report.timeout, missing=report.missing)
        case ArgumentLost():
            path = "an ObjectRef in the arguments"
            return PayloadError(path=path, reason=report.evidence, step="fetch")
        case DriverFailed():
            error = LaunchError(
                f"{report.what} (host {failure.hostname}). This is a bug in torchrunx_ray: please report it "
                "with this traceback."
            )
            error.__cause__ = report.error
            return error
        case messages.Died():
            assert rank is not None
            assert report.exited.local_rank is not None
            data = error_file.parsed(report.recorded)
            return WorkerFailedError(
                rank=rank,
                local_rank=report.exited.local_rank,
                hostname=failure.hostname,
                pid=report.exited.pid,
                what=_how_it_died(report),
                exit_code=report.exited.exit_code,
                signal=report.exited.signal,
                peak_memory=report.exited.peak_memory,
                last_lines=report.last_lines,
                oom_kills=report.oom_kills,
                error_file_data=data,
                recorded="" if data is None else error_file.in_words(data),
            )
        case messages.ScopeExpired():
            assert rank is not None
            data = error_file.parsed(report.recorded)
            return WorkerFailedError(
                rank=rank,
                local_rank=report.local_rank,
                hostname=failure.hostname,
                pid=report.pid,
                what=expired.in_words(report),
                signal=report.signal,
                last_lines=report.last_lines,
                error_file_data=data,
                recorded="" if data is None else error_file.in_words(data),
                expired_scope=expired.scope_of(report),
            )
        case messages.Failed():
            assert rank is not None
            error = _raised(report, rank, failure.hostname)
            if (hint := main_guard.advice(report.last_lines)) is not None:
                _add_note(error, hint)
            return error


def _how_it_died(died: messages.Died) -> str:
    how = describe_exit(died.exited.exit_code, died.exited.signal)
    if died.exited.signal is not None or died.was_replaced:
        return how
    if any(line.startswith(messages.NOT_REPORTED) for line in died.last_lines):
        return f"{how} without reporting the outcome of its function"
    return f"{how} before its function returned or raised"


def _raised(report: messages.Failed, rank: int, hostname: str) -> BaseException:
    unraisable = report.unraisable
    data = error_file.parsed(report.recorded)
    if report.exception is not None:
        try:
            error = load_exception(report.exception)
        except (Exception, SystemExit, GeneratorExit) as reason:  # Ctrl-C is meant for the driver
            unraisable = (
                f"raised {report.kind}: {report.text} (shown as text, since the driver cannot "
                f"unpickle it: {type(reason).__name__}: {reason})"
            )
        else:
            cause = RemoteFailure(
                rank=rank,
                local_rank=report.local_rank,
                hostname=hostname,
                pid=report.pid,
                traceback=report.traceback,
                error_file_data=data,
            )
            # Set through the base class: an exception may refuse attributes.
            vars(BaseException)["__cause__"].__set__(error, cause)
            where = f"local rank {report.local_rank} on {hostname}, pid {report.pid}"
            _add_note(error, f"Raised by rank {rank} ({where}).")
            if data is not None and not _is_same_error(report, data):
                said = textwrap.indent(error_file.in_words(data), "  ")
                _add_note(error, f"The error file of the rank:\n{said}")
            if (hint := advice(error, report.traceback)) is not None:
                _add_note(error, hint)
            return error
    failed = WorkerFailedError(
        rank=rank,
        local_rank=report.local_rank,
        hostname=hostname,
        pid=report.pid,
        what=unraisable,
        exit_code=report.exit_code,
        traceback="" if _is_exit(report) else report.traceback,
        error_file_data=data,
        recorded="" if data is None or _is_same_error(report, data) else error_file.in_words(data),
    )
    failed.traceback = report.traceback
    return failed


def _is_same_error(report: messages.Failed, data: Mapping[str, Any]) -> bool:
    """Return True if the rank's error file has only the exception that the rank raised."""
    return error_file.message_of(data) == f"{report.kind.rpartition('.')[2]}: {report.text}"


def _is_of_no_peer(report: Report) -> bool:
    """Return True if no error of a peer can cause this failure. SIGABRT may come from NCCL's watchdog."""
    match report:
        case messages.Died(exited=exited):
            return exited.signal not in (None, signal.SIGABRT)
        case messages.AgentFailed():
            return True
        case _:
            return False


def _is_exit(report: Report) -> bool:
    """Return True if the function called `sys.exit`, as argparse does after a usage error."""
    return isinstance(report, messages.Failed) and report.unraisable.startswith("called sys.exit(")


def _add_note(error: BaseException, note: str) -> None:
    try:
        BaseException.add_note(error, note)
    except Exception:
        pass  # the exception refuses attributes; a missing note is better than another error


def _consequences(in_order: Sequence[Failure]) -> list[str]:
    """Return the later failures, with one line for all that differ only in numbers."""
    first = in_order[0]
    groups: dict[str, list[Failure]] = {}
    for failure in in_order[1:]:
        groups.setdefault(re.sub(r"\d+", "#", _summary(failure.report)), []).append(failure)
    lines: list[str] = []
    for members in groups.values():
        after_s = (members[0].time_ns - first.time_ns) / 1e9
        when = f"{abs(after_s):.3f} s {'later' if after_s >= 0 else 'earlier'}"
        lines.append(f"{when}, {_in_one_line(members)}")
    return lines


def _in_one_line(failures: Sequence[Failure]) -> str:
    """Return the first failure's text, after the names of all failures with the same text."""
    said = _summary(failures[0].report)
    who = ", ".join(each.who for each in failures if _summary(each.report) == said)
    others = ", ".join(each.who for each in failures if _summary(each.report) != said)
    return f"{who}: {said} (much the same on {others})" if others else f"{who}: {said}"


def _where(report: Report) -> str:
    """Return the innermost line of the traceback. For an exception group, the members' tracebacks do not count."""
    trace = report.traceback.partition("+-+-")[0] if isinstance(report, messages.Failed) else ""
    lines = _FRAME.findall(trace)
    return " ({}:{}, in {})".format(*lines[-1]) if lines else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _summary(report: Report) -> str:
    match report:
        case messages.Failed():
            return f"{report.kind}: {_first_line(report.text)}"
        case messages.Died():
            how = describe_exit(report.exited.exit_code, report.exited.signal)
            data = error_file.parsed(report.recorded)
            return how if data is None else f"{how}: {_first_line(error_file.message_of(data))}"
        case messages.ScopeExpired():
            return expired.what_expired(report)
        case messages.AgentFailed():
            return report.what
        case messages.TemplateRefused():
            return report.problem
        case NotJoined():
            return "the process group was not complete in time"
        case ArgumentLost():
            return "an ObjectRef in the arguments could not be fetched"
        case DriverFailed():
            return report.what
