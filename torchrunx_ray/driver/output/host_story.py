"""Events on a host of a run, as lines for the host's log file."""

import signal
from collections.abc import Callable, Sequence
from datetime import datetime

from torchrunx_ray.driver.report.expired import what_expired
from torchrunx_ray.driver.report.failures import ArgumentLost, DriverFailed, NotJoined
from torchrunx_ray.driver.report.stacks import in_words
from torchrunx_ray.errors import describe_exit
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.stop_board import StopReason

HostEvent = messages.Event | NotJoined | ArgumentLost | DriverFailed


def begin(attempt: messages.AttemptId, ranks: Sequence[int], world_size: int) -> str:
    return f"run {attempt.run_id}, attempt {attempt.number}: {in_words(ranks)} of {world_size} on this host"


def begin_again(attempt: messages.AttemptId, new_rank: int | None) -> str:
    """Return a line for the file of a worker. `new_rank` is set if the file had another rank's output before, or none."""
    as_rank = "" if new_rank is None else f" as rank {new_rank}"
    return f"attempt {attempt.number} begins{as_rank}"


def left_out(attempt: messages.AttemptId) -> str:
    """Return a line for the file of a host that the attempt does not use."""
    return f"attempt {attempt.number} is not on this host"


def ask_to_stop(reason: StopReason, within_s: float | None) -> str:
    until = "" if within_s is None else f", within {within_s:g} s"
    return f'the function is asked to stop ("{reason}"){until}'


def stop(grace_s: float, signum: signal.Signals) -> str:
    how = f"{signum.name}, and SIGKILL after {grace_s:g} s" if grace_s > 0 else "SIGKILL"
    return f"stopping the workers that still run: {how}"


def line_of(
    event: HostEvent, rank: int | None, on_ours: Callable[[int], int], begun_ns: int
) -> tuple[str, int]:
    """Return the line for an event, and the event's time on the driver's clock.

    The line is "" if the event needs none. The traceback of a failure follows its line.

    `on_ours` converts a time of the host to the driver's clock. On that clock the run began at `begun_ns`.
    """
    match event:
        case messages.TemplateLoaded():
            return _loaded(event, on_ours(event.loaded_ns), begun_ns), now_ns()
        case messages.Started():
            return f"{_worker(event, rank)} calls the function", on_ours(event.time_ns)
        case messages.Finished():
            return f"rank {rank} has returned", on_ours(event.time_ns)
        case messages.Failed():
            what = ": ".join(filter(None, (event.kind, event.text.partition("\n")[0])))
            text = f"{_worker(event, rank)} has failed: {what}\n{event.traceback}".rstrip()
            return text, on_ours(event.time_ns)
        case messages.ScopeExpired():
            return f"{_worker(event, rank)} {what_expired(event)}", on_ours(event.time_ns)
        case messages.Exited():
            return f"{_worker(event, rank)} {_how(event)}", on_ours(event.time_ns)
        case messages.Died():
            exited = event.exited
            without = "" if event.was_replaced else ", without an outcome"
            text = f"{_worker(exited, rank)} {_how(exited)}{without}"
            return text, on_ours(exited.time_ns)
        case messages.AgentFailed():
            return ": ".join(filter(None, (event.what, event.evidence))), on_ours(event.time_ns)
        case messages.HostEnded():
            return "the run has ended on this host: none of its workers is left", now_ns()
        case messages.TemplateRefused():
            return f"the template cannot be used: {event.problem}", now_ns()
        case NotJoined():
            missing = in_words(event.missing)
            return f"not in the process group after {event.timeout:g} s: {missing}", now_ns()
        case ArgumentLost():
            return f"an argument was lost: {event.evidence}", now_ns()
        case DriverFailed():
            return event.what, now_ns()
        case _:
            return "", now_ns()


def _loaded(loaded: messages.TemplateLoaded, until_ns: int, begun_ns: int) -> str:
    took_s = (loaded.loaded_ns - loaded.begun_ns) / 1e9
    if until_ns >= begun_ns:
        return f"the template was started; its imports took {took_s:.2f} s"
    then = datetime.fromtimestamp(until_ns / 1e9)
    return f"the template is warm; its imports took {took_s:.2f} s, until {then:%Y-%m-%d %H:%M:%S}"


def _worker(
    event: messages.Started | messages.Failed | messages.Exited | messages.ScopeExpired,
    rank: int | None,
) -> str:
    return f"rank {rank} (local rank {event.local_rank}, pid {event.pid})"


def _how(exited: messages.Exited) -> str:
    return describe_exit(exited.exit_code, exited.signal)
