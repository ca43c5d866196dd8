"""The agent's only child and its child: tiny, and there to outlive the template.

Ray SIGKILLs an agent's direct children when the agent is killed, or its driver or raylet dies, at any
moment and more than once. A template that were one of them could not clean up, and a keeper that is
one may be killed at its work. Hence two, one below the other: the inner one ends the template, which
it does alone, and the outer one takes its place if it is killed. Both are subreapers: what a killed
template leaves behind comes to them, and is killed. SIGTERM to the outer one is how the agent ends a
template; of an agent that died otherwise both hear themselves, since a template that still imports
cannot.
"""

import os
import signal
import sys
from typing import NoReturn

from torchrunx_ray.wire import linux, process_tree
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.title import set_title

_ENDING_S = 12.0
"""For the inner keeper to end; longer than it waits for processes that SIGKILL does not end."""


def main() -> int:
    channel = Channel.from_fd(int(sys.argv[1]))
    alive_fd = int(sys.argv[2])
    del sys.argv[3:]  # room for titles
    set_title("outer keeper")
    agent_fd = linux.pidfd_open(os.getppid())
    _shed_what_ray_gave()
    # Not to be ended before it can end the template.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    told, tell = os.pipe()
    process_tree.become_subreaper()
    inner_pid = os.fork()
    if inner_pid != 0:
        channel.close()
        os.close(tell)
        return _keep(inner_pid, agent_fd, signal.SIGTERM, told)
    os.close(told)
    set_title("keeper")
    process_tree.become_subreaper()
    template_pid = os.fork()
    if template_pid == 0:
        for fd in (agent_fd, alive_fd, tell):
            os.close(fd)
        _become_template(channel)
    channel.close()
    os.write(tell, str(template_pid).encode())
    os.close(tell)
    return _keep(template_pid, agent_fd, signal.SIGKILL)


def _become_template(channel: Channel) -> NoReturn:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.setsid()
    set_title("template")
    from torchrunx_ray.worker import template

    template.main(channel)


def _keep(
    child_pid: int, agent_fd: int, end_with: signal.Signals, heir_fd: int | None = None
) -> int:
    """Return when the child, or the agent, has ended and nothing is left below this process.

    From `heir_fd` comes the pid of the process to keep where the child was killed.
    """
    is_asked = False

    def end(_signum: int, _frame: object) -> None:
        nonlocal is_asked
        is_asked = True
        os.kill(child_pid, end_with)  # until it is reaped below its pid is nobody else's

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    child_fd = linux.pidfd_open(child_pid)
    linux.ready([agent_fd, child_fd])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(child_pid, end_with)  # in vain where it has ended
    if not linux.ready([child_fd], _ENDING_S):
        os.kill(child_pid, signal.SIGKILL)
    _, status = os.waitpid(child_pid, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    if heir_fd is not None and exit_code < 0 and not is_asked:
        said = os.read(heir_fd, 32)
        if said and _is_child(int(said)):
            return _keep(int(said), agent_fd, signal.SIGKILL)
    process_tree.kill_children()
    return exit_code if exit_code >= 0 else 128 - exit_code


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _shed_what_ray_gave() -> None:
    """Ray runs its workers at nice 15 with SIGINT blocked, and children inherit both."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to act upon
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except PermissionError:  # only root may raise its own priority
        pass


if __name__ == "__main__":
    sys.exit(main())
