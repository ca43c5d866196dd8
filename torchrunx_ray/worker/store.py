"""The process that serves the launch's TCPStore."""

import resource
import signal
from typing import NoReturn

from torchrunx_ray.worker.dns import never_ask_dns


def serve(listening_fd: int, port: int) -> NoReturn:
    """Serve a TCPStore on a listening socket until killed.

    The agent bound the socket, so no port is guessed, and early clients wait in the backlog. The store has its own
    process: it outlives rank 0, and the agent needs no torch.
    """
    never_ask_dns()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each rank needs a descriptor
    from torch._C._distributed_c10d import TCPStore

    _store = TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False, master_listen_fd=listening_fd
    )
    while True:
        signal.pause()
