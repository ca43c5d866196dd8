"""The agent's only child: tiny, and there to outlive the template.

Ray SIGKILLs an agent's direct children when the agent is killed or its driver dies. A template
that were one of them could not clean up; as the keeper's child it sees the agent's end of their
channel close, and does. The keeper itself is a subreaper: what a killed template leaves behind
comes to it, and is killed. SIGTERM to the keeper is how the agent ends a template; of an agent that
died otherwise the keeper hears itself, since a template that still imports cannot.
"""

import os
import select
import signal
import sys

from torchrunx_ray.wire import family
from torchrunx_ray.wire.channel import Channel


def main() -> int:
    channel = Channel.from_fd(int(sys.argv[1]))
    agent_fd = os.pidfd_open(os.getppid())
    family.become_subreaper()
    _shed_what_ray_gave()
    # Not to be ended before it can end the template.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    template_pid = os.fork()
    if template_pid == 0:
        os.close(agent_fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.setsid()
        from torchrunx_ray.worker import template

        template.main(channel)
    channel.close()
    # Until it is reaped below its pid is nobody else's.
    signal.signal(signal.SIGTERM, lambda _signum, _frame: os.kill(template_pid, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    _wait_for_either(agent_fd, os.pidfd_open(template_pid))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(template_pid, signal.SIGKILL)  # in vain where it has ended
    _, status = os.waitpid(template_pid, 0)
    family.kill_children()
    exit_code = os.waitstatus_to_exitcode(status)
    return exit_code if exit_code >= 0 else 128 - exit_code


def _wait_for_either(agent_fd: int, template_fd: int) -> None:
    poll = select.poll()
    poll.register(agent_fd, select.POLLIN)
    poll.register(template_fd, select.POLLIN)
    poll.poll()


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
