"""An attempt's failures, as torch's elastic agent tells of them."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing import ProcessFailure

from torchrunx_ray.driver.report import error_file
from torchrunx_ray.driver.report.failures import Failure, Failures
from torchrunx_ray.elastic.run import Host
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.ranks import Place


def process_failures(
    failures: Failures,
    hosts: Sequence[Host],
    places: Sequence[Place],
    pids: Mapping[int, int],
    error_files: Mapping[int, str],
) -> dict[int, ProcessFailure]:
    """Return the failures by rank, the cause of the others first.

    `error_files` has the driver's paths of the workers' error files, by index in the attempt. They are written here. A
    failure of a host is a failure of its workers that have none of their own: they have ended with it.
    """
    found: dict[int, ProcessFailure] = {}
    for failure in failures.in_order():
        if failure.rank is not None:
            ranks = [failure.rank]
        else:
            ranks = [
                place.rank for place in places if hosts[place.host_index].label == failure.hostname
            ]
        for rank in ranks:
            if rank not in found:
                index = rank - places[0].rank
                local_rank = places[index].local_rank
                path = error_files.get(index, "")
                found[rank] = _process_failure(failure, local_rank, pids.get(rank, 0), path)
    _date_the_cause_first(found)
    return found


def is_of_blocked_worker(failures: Failures) -> bool:
    """Return True if a worker was blocked in the kernel for too long."""
    return any(
        isinstance(failure.report, messages.ScopeExpired)
        and failure.report.scope.startswith(messages.BLOCKED)
        for failure in failures.in_order()
    )


def _process_failure(
    failure: Failure, local_rank: int, pid: int, error_path: str
) -> ProcessFailure:
    data = _data(failure)
    is_written = data is not None and _write(error_path, data)
    told = ProcessFailure(
        local_rank=local_rank,
        pid=_pid(failure, pid),
        exitcode=_exit_code(failure),
        error_file=error_path if is_written else "",
    )
    if data is not None and not is_written:
        told.error_file_data = data
        told.message = data["message"]
    if not is_written:
        told.timestamp = failure.time_ns // 10**9
    return told


def _pid(failure: Failure, known: int) -> int:
    match failure.report:
        case messages.Failed(pid=pid) | messages.ScopeExpired(pid=pid):
            return pid
        case messages.Died(exited=exited):
            return exited.pid
        case _:
            return known


def _exit_code(failure: Failure) -> int:
    """Return the exit code as `subprocess` has it: less than 0 for a signal."""
    match failure.report:
        case messages.Died(exited=exited) if exited.signal is not None:
            return -exited.signal
        case messages.Died(exited=exited):
            return exited.exit_code or 0
        case messages.ScopeExpired(signal=signum):
            return -signum
        case messages.Failed(exit_code=code):
            return 1 if code is None else code
        case _:
            return -signal.SIGKILL


def _data(failure: Failure) -> dict[str, Any] | None:
    """Return the data of the worker's error file, or what torch would have written there; None for a plain death."""
    time_s = failure.time_ns // 10**9
    report = failure.report
    match report:
        case messages.Failed() | messages.Died() | messages.ScopeExpired():
            recorded = error_file.parsed(report.recorded)
        case _:
            what = f"on {failure.hostname}: {failure.what}"
            return {"message": what, "timestamp": time_s}
    if recorded is not None:
        return recorded if _is_whole(recorded) else _as_text(recorded, time_s)
    if isinstance(report, messages.Failed):
        about = {"py_callstack": report.traceback, "timestamp": str(time_s)}
        return {"message": {"message": f"{report.kind}: {report.text}", "extraInfo": about}}
    if isinstance(report, messages.ScopeExpired):
        return {"message": failure.what, "timestamp": time_s}
    return None


def _is_whole(data: Mapping[str, Any]) -> bool:
    """Return True if the data have a time, without which ProcessFailure takes them for the oldest, or raises."""
    match data:
        case {"message": {"message": _, "extraInfo": {"timestamp": at}}}:
            return str(at).isdecimal()
        case {"message": str(), "timestamp": at}:
            return str(at).isdecimal()
        case _:
            return False


def _as_text(data: Mapping[str, Any], time_s: int) -> dict[str, Any]:
    return {**data, "message": error_file.in_words(data), "timestamp": time_s}


def _write(path: str, data: Mapping[str, Any]) -> bool:
    """Write an error file. Returns False if there is no place for it."""
    if not path or path == os.devnull:
        return False
    try:
        with open(path, "w") as file:
            json.dump(data, file)
    except OSError:
        return False
    return True


def _date_the_cause_first(found: Mapping[int, ProcessFailure]) -> None:
    """Let no failure be older than the cause: torch takes the oldest one, in whole seconds of each host's own clock."""
    first, *others = found.values()
    for other in others:
        other.timestamp = max(other.timestamp, first.timestamp)
