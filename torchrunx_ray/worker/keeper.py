"""The two keepers, small processes that outlive the template and clean up after it.

The outer keeper is the agent's only child. The inner keeper is the outer one's child and the template's parent.

Ray sends SIGKILL to an agent's direct children when the agent is killed, or when its driver or raylet dies. This
can happen at any moment and more than once. A template that is a direct child could not clean up, and a keeper
that is a direct child may be killed while it cleans up. So there are two: the inner keeper ends the template, and
the outer keeper takes over if the inner one is killed.

Both keepers are subreapers: they inherit the processes that a killed template leaves behind, and kill them.
The agent ends a template by SIGTERM to the outer keeper. If the agent dies, both keepers notice, since a template
that is still importing cannot.
"""

import contextlib
import os
import signal
import sys
from typing import NoReturn

from torchrunx_ray.wire import linux, process_tree
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.title import set_title

_ENDING_S = 12.0
"""Time for the child to end; longer than it waits for processes that SIGKILL does not end."""


def main() -> int:
    channel = Channel.from_fd(int(sys.argv[1]))
    alive_fd = int(sys.argv[2])
    del sys.argv[3:]  # the padding that makes room for titles
    set_title("outer keeper")
    agent_fd = linux.pidfd_open(os.getppid())
    _shed_what_ray_gave()
    # A SIGTERM must not end this process before it can end the template.
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
    """Wait until the child or the agent ends, then end everything below this process.

    `heir_fd` yields the pid of the process to keep if the child is killed. The exit code that is returned is the
    child's, or 128 plus the signal that killed it.
    """
    is_asked = False

    def end(_signum: int, _frame: object) -> None:
        nonlocal is_asked
        is_asked = True
        os.kill(child_pid, end_with)  # the pid cannot be reused until the child is reaped below

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    child_fd = linux.pidfd_open(child_pid)
    linux.ready([agent_fd, child_fd])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(child_pid, end_with)  # without effect if the child has ended
    if not linux.ready([child_fd], _ENDING_S):
        os.kill(child_pid, signal.SIGKILL)
    _, status = os.waitpid(child_pid, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    if heir_fd is not None and exit_code < 0 and not is_asked:
        said = os.read(heir_fd, 32)
        if said and process_tree.has_child(int(said)):
            return _keep(int(said), agent_fd, signal.SIGKILL)
    process_tree.kill_children()
    return exit_code if exit_code >= 0 else 128 - exit_code


def _shed_what_ray_gave() -> None:
    """Undo what children of Ray's workers inherit: nice 15 and a blocked SIGINT."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
    with contextlib.suppress(PermissionError):  # only root may raise its own priority
        os.setpriority(os.PRIO_PROCESS, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
