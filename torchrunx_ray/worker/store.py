"""The process that serves the launch's TCPStore."""

import resource
import signal
from typing import NoReturn

from torchrunx_ray.worker.dns import never_ask_dns


def serve(listening_fd: int, port: int) -> NoReturn:
    """Serve a TCPStore on a socket that already listens, until killed.

    The agent bound that socket, so no port was ever guessed, and clients that came early wait in
    its backlog. A process of its own: the store outlives rank 0 and needs no torch in the agent.
    """
    never_ask_dns()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each rank of the launch needs one
    from torch._C._distributed_c10d import TCPStore

    _store = TCPStore(
        "localhost",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening_fd,
    )
    while True:
        signal.pause()
