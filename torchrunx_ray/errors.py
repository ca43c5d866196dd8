"""What a launch can raise, beside the user's own exceptions.

* LaunchError (RuntimeError)
  + PlacementError        the cluster has no room for the launch, now or ever
  + PreloadError          a host's template cannot be forked from (also a ValueError)
  + PayloadError          a function, argument or return value cannot travel
  + WorkerFailedError     a worker died without raising
  + AgentFailedError      an agent, its template, its store or its node died
  + LaunchTimeoutError    not all ranks joined the process group in time
* RemoteFailure           the `__cause__` of an exception that the user's function raised

A wrong option is a ValueError or TypeError from the constructor. What the user's function raises
arrives as itself, with a RemoteFailure as its cause.

Every class words its own message from the facts that it is given, and keeps them as attributes.
"""

import signal as signals
from collections.abc import Mapping, Sequence
from typing import Any

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


def _rebuild(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class _Travels(Exception):
    """Pickles by its finished message and attributes: the constructors take facts, not `args`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class LaunchError(_Travels, RuntimeError):
    """Base of what the launcher itself raises."""


class PlacementError(LaunchError):
    """The cluster has no room for the launch.

    `wanted` holds the resources asked for, per host; `available` what each live node has in all,
    by hostname.
    """

    def __init__(
        self,
        problem: str,
        *,
        wanted: Sequence[Mapping[str, float]] = (),
        available: Mapping[str, Mapping[str, float]] | None = None,
        advice: str = "",
    ) -> None:
        self.wanted = [dict(bundle) for bundle in wanted]
        self.available = {host: dict(total) for host, total in (available or {}).items()}
        lines = [problem]
        lines += [
            f"  wanted on host {i}: {_resources(bundle)}" for i, bundle in enumerate(self.wanted)
        ]
        lines += [
            f"  node {host} has: {_resources(total)}" for host, total in self.available.items()
        ]
        super().__init__("\n".join(lines + ([advice] if advice else [])))


class PreloadError(LaunchError, ValueError):
    """A host's template cannot be forked from, because of a module in `preload`."""

    def __init__(self, *, hostname: str, problem: str, advice: str, evidence: str = "") -> None:
        self.hostname = hostname
        message = f"On {hostname}: {problem} {advice}"
        super().__init__(f"{message}\n{evidence.rstrip()}" if evidence else message)


class PayloadError(LaunchError):
    """A value cannot travel between driver and workers.

    `path` leads to the part that is to blame, such as `kwargs['cfg'].lock`; `rank` is the rank
    whose return value it was, None for the function and its arguments.
    """

    def __init__(
        self,
        *,
        path: str,
        reason: str,
        rank: int | None = None,
        hostname: str | None = None,
        unpacking: bool = False,
    ) -> None:
        self.path = path
        self.rank = rank
        self.hostname = hostname
        whose = "" if rank is None else f" of rank {rank} on {hostname}"
        done = "unpickled" if unpacking else "pickled"
        advice = (
            "Is the module it was defined in importable here, in the same version?"
            if unpacking
            else "Make it inside the function instead, or give its class a __reduce__ or __getstate__."
        )
        super().__init__(f"{path}{whose} cannot be {done}: {reason}\n{advice}")


class WorkerFailedError(LaunchError):
    """A worker ended without an outcome, or with one that cannot be raised on the driver."""

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
        traceback: str = "",
    ) -> None:
        self.rank = rank
        self.local_rank = local_rank
        self.hostname = hostname
        self.pid = pid
        self.exit_code = exit_code
        self.signal = signal
        self.peak_memory = peak_memory
        self.last_lines = list(last_lines)
        self.traceback = traceback
        lines = [f"rank {rank} (local rank {local_rank} on {hostname}, pid {pid}) {what}"]
        if peak_memory:
            lines[0] += f"; its peak memory was {peak_memory / 2**20:.0f} MiB"
        if last_lines:
            lines.append("Its last lines of stderr:")
            lines += [f"  {line}" for line in last_lines]
        if traceback:
            lines.append(traceback.rstrip())
        super().__init__("\n".join(lines))


class AgentFailedError(LaunchError):
    """An agent, or a process it cannot do without, died."""

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
            f"after {timeout:g} s the process group is still without {who}. Does something there "
            "block before the function starts (an import, a mount), or a firewall between the hosts?"
        )


class RemoteFailure(_Travels):
    """Where, and with what traceback, the user's function raised.

    `failures` holds all ranks' failures in order of time, this one first.
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
    ) -> None:
        self.rank = rank
        self.local_rank = local_rank
        self.hostname = hostname
        self.pid = pid
        self.traceback = traceback
        self.failures = list(failures)
        super().__init__(f"on rank {rank} ({hostname}, pid {pid}):\n{traceback.rstrip()}")


def describe_exit(exit_code: int | None, signal: int | None) -> str:
    """Words for how a process ended."""
    if signal is None:
        return f"ended with exit code {exit_code}"
    try:
        name = signals.Signals(signal).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {signal}"
    return f"was killed by {name}"


def _resources(amounts: Mapping[str, float]) -> str:
    shown = {k: v for k, v in amounts.items() if not k.startswith(("node:", "object_store"))}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"
