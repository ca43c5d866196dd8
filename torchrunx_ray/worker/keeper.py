"""The two keepers, small processes that outlive the template and clean up after it.

The outer keeper is the agent's only child. The inner keeper is the outer one's child and the template's parent.

Ray sends SIGKILL to an agent's direct children when the agent is killed, or when its driver or raylet dies. This
can happen at any moment and more than once. A template that is a direct child could not clean up, and a keeper
that is a direct child may be killed while it cleans up. So there are two: the inner keeper ends the template, and
the outer keeper takes over if the inner one is killed.

Both keepers are subreapers: they inherit the processes that a killed template leaves behind, and kill them.
The agent ends a template by SIGTERM to the outer keeper. If the agent dies, both keepers notice, since a template
that is still importing cannot.

If the run may be started again elsewhere, both keepers hold the lease of the workers, and kill them when it runs out.
A frozen agent could not do that. The outer keeper does it even if the inner one is frozen, too.
"""

import contextlib
import os
import signal
import sys
from typing import NoReturn

from torchrunx_ray.wire import folder, linux, process_tree
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.title import set_title
from torchrunx_ray.worker.lease import LeaseWatch

_ENDING_S = 12.0
"""Time for the child to end; longer than it waits for processes that SIGKILL does not end."""


def main() -> int:
    channel = Channel.from_fd(int(sys.argv[1]))
    *descriptors, folder_path, _padding = sys.argv[2:]
    del sys.argv[-1]  # the padding that makes room for titles
    alive_fd, page_fd, outer_news_fd, inner_news_fd, *folder_fds = map(int, descriptors)
    set_title("outer keeper")
    agent_fd = linux.pidfd_open(os.getppid())
    _shed_what_ray_gave()
    # A SIGTERM must not end this process before it can end the template.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    told, tell = os.pipe()
    os.set_blocking(told, False)  # the inner keeper may be frozen before it has told
    process_tree.become_subreaper()
    inner_pid = os.fork()
    if inner_pid != 0:
        channel.close()
        os.close(tell)
        os.close(inner_news_fd)
        lease = LeaseWatch(page_fd, outer_news_fd)
        exit_code = _keep(inner_pid, agent_fd, lease, signal.SIGTERM, told)
        folder.remove(folder_path)
        return exit_code
    os.close(told)
    os.close(outer_news_fd)
    set_title("keeper")
    process_tree.become_subreaper()
    template_pid = os.fork()
    if template_pid == 0:
        for fd in (agent_fd, alive_fd, page_fd, inner_news_fd, *folder_fds, tell):
            os.close(fd)
        _become_template(channel)
    channel.close()
    os.write(tell, str(template_pid).encode())
    os.close(tell)
    exit_code = _keep(template_pid, agent_fd, LeaseWatch(page_fd, inner_news_fd), signal.SIGKILL)
    folder.remove(folder_path)
    return exit_code


def _become_template(channel: Channel) -> NoReturn:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.setsid()
    set_title("template")
    from torchrunx_ray.worker import template

    template.main(channel)


def _keep(
    child_pid: int,
    agent_fd: int,
    lease: LeaseWatch,
    end_with: signal.Signals,
    heir_fd: int | None = None,
) -> int:
    """Wait until the child, the agent or the lease ends, then end everything below this process.

    `heir_fd` yields the pid of the process to keep if the child is killed. The exit code that is returned is the
    child's, or 128 plus the signal that killed it.
    """
    is_asked = False

    def end(_signum: int, _frame: object) -> None:
        nonlocal is_asked
        is_asked = True
        os.kill(child_pid, end_with)  # the pid cannot be reused until the child is reaped below

    signal.signal(signal.SIGTERM, end)
    _precede_others()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    child_fd = linux.pidfd_open(child_pid)
    has_lease_ended = lease.runs_out_before([agent_fd, child_fd])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    if not has_lease_ended:
        os.kill(child_pid, end_with)  # without effect if the child has ended
        has_lease_ended = lease.runs_out_before([child_fd], _ENDING_S)
    os.kill(child_pid, signal.SIGKILL)
    heir_pid = None if heir_fd is None else _read_pid(heir_fd)
    if has_lease_ended:
        _kill_workers(child_pid, heir_pid)
    _, status = os.waitpid(child_pid, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    if heir_pid is not None and exit_code < 0 and not is_asked and process_tree.has_child(heir_pid):
        return _keep(heir_pid, agent_fd, lease, signal.SIGKILL)
    process_tree.kill_children()
    return exit_code if exit_code >= 0 else 128 - exit_code


def _read_pid(fd: int) -> int | None:
    """Read the pid that the inner keeper has told; None if it has told none."""
    with contextlib.suppress(BlockingIOError):
        return int(os.read(fd, 32) or 0) or None
    return None


def _kill_workers(child_pid: int, heir_pid: int | None) -> None:
    """Kill the template, which leads the session of its workers, at once. The rest follows when they are reaped."""
    if heir_pid is None:
        process_tree.kill_session(child_pid)
    elif process_tree.has_grandchild(child_pid, heir_pid):
        process_tree.kill_session(heir_pid)


def _shed_what_ray_gave() -> None:
    """Undo what children of Ray's workers inherit: nice 15 and a blocked SIGINT."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
    with contextlib.suppress(PermissionError):  # only root may raise its own priority
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def _precede_others() -> None:
    """Run before all other processes, if that is allowed. Children do not inherit this.

    All processes of a frozen host wake up at once, and the workers must not run before they are killed. A nice value
    would not do: where Linux groups processes by session, it counts only within the session.
    """
    with contextlib.suppress(OSError):  # a sandbox may not know the call
        policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(1))


if __name__ == "__main__":
    sys.exit(main())
