"""Exceptions that a launch can raise, besides the user's own.

* LaunchError (RuntimeError)
    * PlacementError: the cluster has no room for the launch, now or ever
    * PreloadError: a host's template cannot be forked from (also a ValueError)
    * PayloadError: a function, argument or return value cannot be sent
    * WorkerFailedError: a worker died without raising
    * AgentFailedError: an agent, its template, its store or its node died
    * LaunchTimeoutError: not all ranks joined the process group in time
* RemoteFailure: the `__cause__` of an exception that the user's function raised

A wrong option raises ValueError or TypeError: from the constructor if the error is known then, otherwise from the
launch. An exception of the user's function is raised as the same type, with a RemoteFailure as its cause.

Every class builds its message from the facts passed to its constructor, and keeps these facts as attributes.
"""

import contextlib
import itertools
import signal as signals
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "AgentFailedError",
    "LaunchError",
    "LaunchTimeoutError",
    "PayloadError",
    "PlacementError",
    "PreloadError",
    "RemoteFailure",
    "WorkerFailedError",
]

_NODES_SHOWN = 30


def made_without_constructor(
    kind: type[BaseException],
    args: tuple[Any, ...],
    state: dict[str, Any],
    fields: Sequence[tuple[type, str, Any]] = (),
) -> BaseException:
    """Recreate an exception whose constructor may take other arguments than `args`.

    Only the base class in C is initialised again, with `args`. `fields` are values outside the exception's
    `__dict__`, in C or in slots, each with the class that defines the field.
    """
    in_c: Any = kind
    while not isinstance(in_c.__dict__.get("__new__"), types.BuiltinFunctionType):
        in_c = in_c.__base__  # the base class that determines the memory layout
    error = in_c.__new__(kind, *args)
    with contextlib.suppress(Exception):  # the original constructor may never have called this
        in_c.__init__(error, *args)
    error.__dict__.update(state)
    for owner, name, value in fields:
        vars(owner)[name].__set__(error, value)
    return error


class _Travels(Exception):
    """Base of exceptions pickled by their message and attributes, since their constructors do not take `args`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return made_without_constructor, (type(self), self.args, dict(self.__dict__))


class LaunchError(_Travels, RuntimeError):
    """Base of the exceptions that the launcher itself raises.

    `attempts` has all attempts of a run that has failed, as AttemptRecords.
    """

    attempts: Sequence[Any] = ()


class PlacementError(LaunchError):
    """The cluster has no room for the launch.

    `wanted` has the resources for each host. `free` and `total` have the resources of each live node, by node name.
    """

    def __init__(
        self,
        problem: str,
        *,
        wanted: Sequence[Mapping[str, float]] = (),
        free: Mapping[str, Mapping[str, float]] | None = None,
        total: Mapping[str, Mapping[str, float]] | None = None,
        advice: str = "",
    ) -> None:
        self.wanted = [dict(bundle) for bundle in wanted]
        self.free = {node: dict(amounts) for node, amounts in (free or {}).items()}
        self.total = {node: dict(amounts) for node, amounts in (total or {}).items()}
        table = room_table(self.wanted, self.free, self.total)
        super().__init__("\n".join(part for part in (problem, table, advice) if part))


class PreloadError(LaunchError, ValueError):
    """A host's template cannot be forked from, because of a module in `preload`."""

    def __init__(self, *, hostname: str, problem: str, advice: str, evidence: str = "") -> None:
        self.hostname = hostname
        message = f"On {hostname}: {problem} {advice}"
        super().__init__(f"{message}\n{evidence.rstrip()}" if evidence else message)


class PayloadError(LaunchError):
    """A value cannot be sent between driver and workers.

    `path` leads to the part that caused the error, such as `kwargs['cfg'].lock`. `rank` is the rank that returned the
    value, or None for the function and its arguments. `step` is the step that failed: pickling, storing in Ray,
    fetching from Ray, or unpickling. `missing_module` is the module, if any, that the receiver could not import.
    """

    def __init__(
        self,
        *,
        path: str,
        reason: str,
        step: Literal["pickle", "store", "fetch", "unpickle"] = "pickle",
        rank: int | None = None,
        hostname: str | None = None,
        missing_module: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.path = path
        self.step = step
        self.rank = rank
        self.hostname = hostname
        self.missing_module = missing_module
        whose = "" if rank is None else f" of rank {rank}"
        where = "" if hostname is None else f" on {hostname}"
        if step == "unpickle" and rank is not None:  # a return value, which the driver unpickles
            whose, where = f"{whose}{where}", " on the driver"
        done = {"store": "stored", "fetch": "fetched"}.get(step, f"{step}d")
        if advice is None:
            advice = _travel_advice(step, reason, rank is not None, missing_module)
        super().__init__(f"{path}{whose} cannot be {done}{where}: {reason}\n{advice}".rstrip())


def _travel_advice(step: str, reason: str, is_value: bool, missing_module: str | None) -> str:
    if step == "fetch":
        return "The task that computes the value failed, or Ray lost the value with the node that held it."
    if step == "store":
        return (
            "Send less data at once, or give the node more room: raise object_store_memory of ray.init or "
            "`ray start`, and free space on the disk that Ray falls back to."
        )
    if step == "pickle":
        return ""
    if "process group" in reason:
        instead = "Return" if is_value else "Pass"
        return (
            "A DistributedDataParallel model, or another object that holds a process group, can be unpickled only in a "
            f"process that has such a group. {instead} model.module or its state_dict() instead."
        )
    if not reason.startswith(("ModuleNotFoundError", "ImportError", "AttributeError")):
        return (
            "The class's own code raised this error. Does the class need something that only the sending "
            "process has, or another version of its module?"
        )
    if missing_module is None:
        return "Is the module that defines it importable there, in the same version?"
    if is_value:
        return f"Make {missing_module} importable in the driver, in the same version."
    return f"Workers import {missing_module} themselves, so every host must have it."


@dataclass(frozen=True)
class OomKills:
    """Counts of processes of a memory cgroup that the kernel's out-of-memory killer has killed."""

    cgroup: str
    limit: int | None
    """Bytes that the cgroup may use."""
    before: int
    """The count at the start of the run."""
    after: int
    """The count after the worker's death."""

    def in_words(self) -> str:
        limit = (
            "no limit of its own" if self.limit is None else f"limit {bytes_in_words(self.limit)}"
        )
        where = f"its memory cgroup {self.cgroup} ({limit})"
        if self.after == self.before:
            return (
                f"Nothing shows a lack of memory: {where} counts as many out-of-memory kills as before "
                f"({self.before}). The kernel does not say who sent the signal: a person, a batch "
                "system, a watchdog?"
            )
        return (
            f"Out of memory: the kernel's count of out-of-memory kills in {where} rose from "
            f"{self.before} to {self.after} during the run. Use less memory (fewer workers on a host, "
            "smaller batches), or give the host or its container more memory."
        )


@dataclass(frozen=True)
class ExpiredScope:
    """A scope of torch's `expires` that a process has not left in time."""

    name: str
    seconds: float
    """Time that the scope allowed."""
    pid: int
    """The process that entered the scope: the worker, or a process that the worker started."""
    stacks: str
    """Stacks of all threads of the worker at the deadline; empty if it did not answer."""


class WorkerFailedError(LaunchError):
    """A worker ended without an outcome, or with an outcome that cannot be raised on the driver.

    `oom_kills` is evidence for or against a lack of memory, if a SIGKILL ended the worker. `stacks` shows what the
    other workers were doing. `error_file_data` is what the worker wrote to TORCHELASTIC_ERROR_FILE, as torch's
    `@record` does, or None; `recorded` is its text. `expired_scope` is set if the watchdog sent the `signal`.
    """

    def __init__(
        self,
        *,
        rank: int,
        local_rank: int,
        hostname: str,
        pid: int,
        what: str,
        exit_code: int | None = None,
        signal: int | None = None,
        peak_memory: int | None = None,
        last_lines: Sequence[str] = (),
        oom_kills: OomKills | None = None,
        traceback: str = "",
        error_file_data: Mapping[str, Any] | None = None,
        recorded: str = "",
        expired_scope: ExpiredScope | None = None,
    ) -> None:
        self.rank = rank
        self.local_rank = local_rank
        self.hostname = hostname
        self.pid = pid
        self.oom_kills = oom_kills
        self.exit_code = exit_code
        self.signal = signal
        self.peak_memory = peak_memory
        self.last_lines = list(last_lines)
        self.traceback = traceback
        self.error_file_data = error_file_data
        self.recorded = recorded
        self.expired_scope = expired_scope
        self.stacks = ""
        lines = [f"rank {rank} (local rank {local_rank} on {hostname}, pid {pid}) {what}"]
        if peak_memory:
            lines[0] += f"; its peak memory was {bytes_in_words(peak_memory)}"
        if oom_kills is not None:
            lines.append(oom_kills.in_words())
        if recorded:
            lines.append("Its error file:")
            lines += [f"  {line}" for line in recorded.splitlines()]
        if unsaid := _without_end(last_lines, recorded.splitlines()):
            lines.append("Its last lines of stderr:")
            lines += [f"  {line}" for line in unsaid]
        if traceback:
            lines.append(traceback.rstrip())
        super().__init__("\n".join(lines))


def _without_end(lines: Sequence[str], end: Sequence[str]) -> Sequence[str]:
    """Return the lines without the end that they share with others: stderr may end with the recorded traceback."""
    pairs = zip(reversed(lines), reversed(end), strict=False)
    shared = itertools.takewhile(lambda pair: pair[0].strip() == pair[1].strip(), pairs)
    return lines[: len(lines) - sum(1 for _ in shared)]


class AgentFailedError(LaunchError):
    """An agent died, or a process that the agent needs."""

    def __init__(self, *, hostname: str, what: str, evidence: str = "") -> None:
        self.hostname = hostname
        message = f"{what} on {hostname}"
        super().__init__(f"{message}: {evidence}" if evidence else message)


class LaunchTimeoutError(LaunchError):
    """Not all ranks joined the process group in time."""

    def __init__(self, *, timeout: float, missing: Mapping[int, str]) -> None:
        self.missing = dict(missing)
        who = ", ".join(f"rank {rank} on {host}" for rank, host in self.missing.items())
        super().__init__(
            f"after {timeout:g} s the process group is still without {who}. Does something block "
            "there before the function starts (an import, a mount)? Does a firewall block connections between the "
            "hosts?"
        )


class RemoteFailure(_Travels):
    """Rank and traceback of an exception of the user's function.

    `traceback` is empty if no line of the user's code raised, since the return value could not be sent.
    `failures` has the failures of all ranks: this one first, then the others in order of time. `stacks` shows what
    the other workers were doing. `attempts` has all attempts of the run, as AttemptRecords. `error_file_data` is what
    the rank wrote to TORCHELASTIC_ERROR_FILE, as torch's `@record` does, or None.
    """

    def __init__(
        self,
        *,
        rank: int,
        local_rank: int,
        hostname: str,
        pid: int,
        traceback: str,
        failures: Sequence[BaseException] = (),
        error_file_data: Mapping[str, Any] | None = None,
    ) -> None:
        self.rank = rank
        self.local_rank = local_rank
        self.hostname = hostname
        self.pid = pid
        self.traceback = traceback
        self.failures = list(failures)
        self.error_file_data = error_file_data
        self.stacks = ""
        self.attempts: Sequence[Any] = ()
        where = f"on rank {rank} ({hostname}, pid {pid})"
        super().__init__(f"{where}:\n{traceback.rstrip()}" if traceback else where)


def describe_exit(exit_code: int | None, signal: int | None) -> str:
    """Describe how a process ended."""
    return (
        f"ended with exit code {exit_code}"
        if signal is None
        else f"was killed by {signal_name(signal)}"
    )


def signal_name(signal: int) -> str:
    """Return the name of a signal, such as SIGKILL."""
    try:
        return signals.Signals(signal).name
    except ValueError:  # a real-time signal has no name
        return f"signal {signal}"


def room_table(
    wanted: Sequence[Mapping[str, float]],
    free: Mapping[str, Mapping[str, float]],
    total: Mapping[str, Mapping[str, float]],
) -> str:
    """Format a table of the resources that hosts of a launch want, and of each node's free and total resources."""
    bundles = Counter(amounts_in_words(bundle) for bundle in wanted)
    lines = [f"  wanted: {count} x ({bundle})" for bundle, count in bundles.items()]
    names = sorted({"CPU", "GPU"}.union(*wanted))
    for node, amounts in list(total.items())[:_NODES_SHOWN]:
        shown = ", ".join(
            f"{_amount(free[node].get(name, 0)) + ' of ' if node in free else ''}"
            f"{_amount(amounts.get(name, 0))} {name}"
            for name in names
            if (name in amounts and not _is_accelerator(name)) or name in ("CPU", "GPU")
        )
        kinds = [_named(name) for name in names if name in amounts and _is_accelerator(name)]
        lines.append(f"  {node}: {', '.join([shown + ' free' * (node in free), *kinds])}")
    if len(total) > _NODES_SHOWN:
        lines.append(f"  and {len(total) - _NODES_SHOWN} more nodes")
    return "\n".join(lines)


def counted(count: float, noun: str) -> str:
    """Return a count with its noun, such as "1 host" or "2 hosts"."""
    return f"{count:g} {noun}{'s' * (count != 1)}"


def amounts_in_words(amounts: Mapping[str, float]) -> str:
    return ", ".join(
        _named(name) if _is_accelerator(name) else f"{_amount(amount)} {name}"
        for name, amount in sorted(amounts.items())
    )


def _is_accelerator(name: str) -> bool:
    """Return True for a resource that only names a type of accelerator; its amount means nothing."""
    return name.startswith("accelerator_type:")


def _named(accelerator: str) -> str:
    return accelerator.replace("accelerator_type:", "accelerator type ")


def bytes_in_words(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _amount(amount: float) -> str:
    return f"{amount:g}"
