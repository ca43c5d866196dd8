"""Functions that find, signal, reap and kill the descendants of this process."""

import contextlib
import ctypes
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torchrunx_ray.wire import linux, proc

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_TRACKER_GRACE_S = 2.0
"""Time for multiprocessing's resource tracker, which removes its process's files in /dev/shm and then ends.

On a busy machine the tracker may still be starting when its process is killed.
"""

_WAITED_FOR = 8
"""Children that are waited for at a time, since each takes a descriptor."""

_DEATH_S = 10.0
"""Time that a killed process may take to free its memory, or a GPU's."""


def become_subreaper() -> None:
    """Make this process a subreaper: orphans among its descendants become its children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent_pid: int, signum: int = signal.SIGKILL) -> None:
    """Make the kernel kill this process when its parent ends, or send it another signal."""
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent_pid:  # the parent ended before the call above
        os.kill(os.getpid(), signum)


def signal_group(group: int, signum: int) -> None:
    """Send a signal to a process group, which may be gone.

    SIGKILL is not sent to the group's resource trackers, which end by themselves.
    """
    if signum != signal.SIGKILL:
        _ignore_missing(os.killpg, group, signum)
        return
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return  # most often the group is empty; this avoids a scan of all processes
    for pid, (state, _parent, in_group, *_) in _every_process():
        is_member = int(in_group) == group and state != "Z"
        if is_member and not _is_resource_tracker(pid):
            _ignore_missing(os.kill, pid, signal.SIGKILL)


def kill_session(leader: int) -> None:
    """Kill the processes of a session, the leader and its children first. The kernel would do so later.

    The leader must be a descendant of this process. Processes that only clean up are spared, see `kill_children`.
    """
    _ignore_missing(os.kill, leader, signal.SIGKILL)  # a fork that it has begun fails
    children = proc.children(leader)  # none if it has ended; the kernel has killed them then
    for pid in children:
        _ignore_missing(os.kill, pid, signal.SIGKILL)
    for pid in (*children, leader):
        _let_end_first(pid)
    for pid, (_state, _parent, _group, session, *_) in _every_process():
        if int(session) == leader and not (_is_resource_tracker(pid) or ends_by_itself(pid)):
            _ignore_missing(os.kill, pid, signal.SIGKILL)


def reap_ended(heard: Callable[[int, int, int], None] | None = None) -> bool:
    """Reap every child that has ended, and call `heard(pid, exit_code, peak_memory)` for each.

    Return True if a child was reaped.
    """
    found = False
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found = True
        if heard is not None:
            heard(pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)


def kill_children(reap: Callable[[], bool] = reap_ended) -> list[int]:
    """Kill and reap all children, and their children as they become ours, until none is left.

    Children that end by themselves are spared. Return the pids that survived SIGKILL for `_DEATH_S`, which are in
    uninterruptible sleep.
    """
    begun, me = time.monotonic(), os.getpid()
    while has_child():
        # Not /proc/self/task/*/children: it needs CONFIG_PROC_CHILDREN.
        all_children = (pid for pid, (_, parent, *_) in _every_process() if int(parent) == me)
        children = [pid for pid in all_children if not ends_by_itself(pid)]
        if not children:
            break
        spent_s = time.monotonic() - begun
        spare_trackers = spent_s < _TRACKER_GRACE_S
        for pid in children:
            if not (spare_trackers and _is_resource_tracker(pid)):
                _ignore_missing(os.kill, pid, signal.SIGKILL)
        if not reap():
            if spent_s > _DEATH_S:
                return children
            _wait_for_end_of_any(children, _TRACKER_GRACE_S)
    return []


def has_grandchild(child: int, pid: int) -> bool:
    """Return True if `pid` is a child of `child`, or has become a child of this process by the end of `child`."""
    with contextlib.suppress(OSError):
        return int(proc.stat(pid)[1]) in (child, os.getpid())
    return False


def has_child(pid: int | None = None) -> bool:
    """Return True if this process has this child, or any. This is cheaper than a scan of all processes."""
    kind, which = (os.P_ALL, 0) if pid is None else (os.P_PID, pid)
    with contextlib.suppress(ChildProcessError):
        os.waitid(kind, which, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    return False


def _wait_for_end_of_any(children: Iterable[int], timeout_s: float) -> None:
    with contextlib.ExitStack() as opened:
        fds = [linux.pidfd_open(pid) for pid in itertools.islice(children, _WAITED_FOR)]
        for fd in fds:
            opened.callback(os.close, fd)
        linux.ready(fds, timeout_s)


def _every_process() -> Iterator[tuple[int, list[str]]]:
    """Yield each pid with the fields of its stat line."""
    for pid in proc.pids():
        with contextlib.suppress(OSError):  # the process has ended
            yield pid, proc.stat(pid)


def ends_by_itself(pid: int) -> bool:
    """Return True for torch_shm_manager, which ends two seconds after its processes and removes their shared memory."""
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "torch_shm_manager"
    return False


def _is_resource_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _let_end_first(pid: int) -> None:
    """Give a killed process a real-time priority, if allowed: all of its threads must run once more to end."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(1))


def _ignore_missing(call: Callable[[int, int], None], target: int, signum: int) -> None:
    # PermissionError: a set-uid program, which must end by itself or by its owner.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        call(target, signum)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
