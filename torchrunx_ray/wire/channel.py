"""Messages and file descriptors between two processes on one host."""

import array
import errno
import pickle
import socket
from collections.abc import Sequence

from torchrunx_ray.wire import linux

_INLINE_LIMIT = 32 * 1024
"""Size limit of a body inside a packet, which must fit the socket's buffer. A larger body goes in a memory file."""

_MAX_FDS = 32
_INLINE, _IN_FILE = b"i", b"f"


class Channel:
    """One end of a SOCK_SEQPACKET pair that carries pickled messages.

    A message arrives whole or not at all, together with its descriptors (close-on-exec). EOFError means
    that no process holds the other end any more.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def pair(cls) -> "tuple[Channel, Channel]":
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        sock = socket.socket(fileno=fd)
        sock.settimeout(None)  # a preloaded module may have set a default timeout
        return cls(sock)

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_blocking(self, blocking: bool) -> None:
        self._socket.setblocking(blocking)

    def close(self) -> None:
        self._socket.close()

    def say_no_more(self) -> None:
        """Let the other end read EOF. This end still notices when the other one closes."""
        self._socket.shutdown(socket.SHUT_WR)

    def send(self, message: object, fds: Sequence[int] = ()) -> None:
        body = pickle.dumps(message, protocol=5)
        if len(body) <= _INLINE_LIMIT:
            socket.send_fds(self._socket, [_INLINE, body], fds)
            return
        with open(linux.memory_file("torchrunx_ray_message"), "wb") as file:
            file.write(body)
            file.flush()
            socket.send_fds(self._socket, [_IN_FILE], [file.fileno(), *fds])

    def receive(self) -> tuple[object, list[int]]:
        data, fds = self._receive_packet()
        kind, body = data[:1], data[1:]
        if kind == _IN_FILE:
            with open(fds.pop(0), "rb") as file:
                file.seek(0)
                return pickle.load(file), fds
        return pickle.loads(body), fds

    def _receive_packet(self) -> tuple[bytes, list[int]]:
        # Not socket.recv_fds: its descriptors are not close-on-exec, and a descriptor that a worker's
        # subprocess inherits keeps pipes open.
        fds = array.array("i")
        data, ancillary, flags, _address = self._socket.recvmsg(
            _INLINE_LIMIT + 1, socket.CMSG_SPACE(_MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if flags & socket.MSG_CTRUNC:
            raise OSError(
                errno.EMFILE, "a message came without its descriptors: too many open files"
            )
        if not data:
            raise EOFError("the process at the other end of the channel is gone")
        return data, list(fds)
