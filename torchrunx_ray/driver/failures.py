"""From what agents report to the one exception that the driver raises."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchrunx_ray.errors import (
    AgentFailedError,
    PreloadError,
    RemoteFailure,
    WorkerFailedError,
    describe_exit,
)
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.exceptions import load_exception

Report = messages.Failed | messages.Died | messages.AgentFailed | messages.TemplateRefused


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong, with its time on the driver's clock."""

    time_ns: int
    hostname: str
    rank: int | None
    report: Report

    @property
    def who(self) -> str:
        return self.hostname if self.rank is None else f"rank {self.rank} on {self.hostname}"


def exception_of(failures: Sequence[Failure], stopped: Sequence[str]) -> BaseException:
    """The first failure, by time, as what the launch raises.

    A note tells what failed after it, and who was then stopped by the launch.
    """
    in_order = sorted(failures, key=lambda failure: failure.time_ns)
    exceptions = [_exception(failure) for failure in in_order]
    first = exceptions[0]
    if isinstance(first.__cause__, RemoteFailure):
        first.__cause__.failures = exceptions
    for line in _consequences(in_order):
        first.add_note(line)
    if stopped:
        first.add_note(f"Stopped by the launch after that: {', '.join(stopped)}.")
    return first


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
        case messages.Died():
            assert rank is not None
            assert report.exited.local_rank is not None
            return WorkerFailedError(
                rank=rank,
                local_rank=report.exited.local_rank,
                hostname=failure.hostname,
                pid=report.exited.pid,
                what=_how_it_died(report.exited),
                exit_code=report.exited.exit_code,
                signal=report.exited.signal,
                peak_memory=report.exited.peak_memory,
                last_lines=report.last_lines,
            )
        case messages.Failed():
            assert rank is not None
            return _raised(report, rank, failure.hostname)


def _how_it_died(exited: messages.Exited) -> str:
    how = describe_exit(exited.exit_code, exited.signal)
    return how if exited.signal is not None else f"{how} before its function returned or raised"


def _raised(report: messages.Failed, rank: int, hostname: str) -> BaseException:
    unraisable = report.unraisable
    if report.exception is not None:
        try:
            error = load_exception(report.exception)
        except Exception as reason:
            unraisable = (
                f"raised {report.kind}: {report.text} (shown as text, since the driver cannot "
                f"unpickle it: {type(reason).__name__}: {reason})"
            )
        else:
            error.__cause__ = RemoteFailure(
                rank=rank,
                local_rank=report.local_rank,
                hostname=hostname,
                pid=report.pid,
                traceback=report.traceback,
            )
            error.add_note(
                f"Raised by rank {rank} (local rank {report.local_rank} on {hostname}, pid {report.pid})."
            )
            return error
    return WorkerFailedError(
        rank=rank,
        local_rank=report.local_rank,
        hostname=hostname,
        pid=report.pid,
        what=unraisable,
        traceback=report.traceback,
    )


def _consequences(in_order: Sequence[Failure]) -> list[str]:
    """What failed later, in one line for those that differ in numbers only."""
    first = in_order[0]
    groups: dict[str, list[Failure]] = {}
    for failure in in_order[1:]:
        groups.setdefault(re.sub(r"\d+", "#", _summary(failure.report)), []).append(failure)
    return [
        f"{(members[0].time_ns - first.time_ns) / 1e9:.3f} s later, "
        f"{', '.join(member.who for member in members)}: {_summary(members[0].report)}"
        for members in groups.values()
    ]


def _summary(report: Report) -> str:
    match report:
        case messages.Failed():
            first_line = report.text.partition("\n")[0]
            return f"{report.kind}: {first_line}"
        case messages.Died():
            return describe_exit(report.exited.exit_code, report.exited.signal)
        case messages.AgentFailed():
            return report.what
        case messages.TemplateRefused():
            return report.problem
