"""Values on their way between driver and workers."""

import contextlib
import mmap
import os
import pickle
import struct
import sys
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from typing import Any

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire import pickling
from torchrunx_ray.wire.culprit import find_culprit

_ALIGNMENT = 64
"""Of every buffer in a memory file, as numpy and torch kernels like it."""

_keep_packed: ContextVar[bool] = ContextVar("_keep_packed", default=False)
_process_only_carries = False


class Packed:
    """A pickled value: its pickle stream, and its large buffers beside it.

    Wherever a Packed is itself unpickled it turns into the value, except in a process that only
    carries values (an agent, a Ray Client server) and inside `kept_packed()`.
    """

    __slots__ = ("buffers", "stream")

    def __init__(
        self, stream: "bytes | memoryview", buffers: "tuple[memoryview, ...]" = ()
    ) -> None:
        self.stream = stream
        self.buffers = buffers

    def unpack(self) -> Any:
        return pickle.loads(self.stream, buffers=self.buffers)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if protocol < 5:  # Ray Client may ask for less than out-of-band buffers need
            return _arrive, (bytes(self.stream), *map(bytes, self.buffers))
        return _arrive, tuple(pickle.PickleBuffer(part) for part in (self.stream, *self.buffers))

    def write_to(self, fd: int) -> None:
        """Write a memory file that `map_file` reads."""
        parts = [memoryview(part).cast("B") for part in (self.stream, *self.buffers)]
        header = struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts))
        with open(fd, "wb", buffering=0, closefd=False) as file:
            _write_all(file.write, memoryview(header))
            for part in parts:
                file.seek(_aligned(file.tell()))
                _write_all(file.write, part)
            # A trailing empty buffer leaves the file short of the position it stands for.
            file.truncate(max(file.tell(), os.fstat(fd).st_size))

    @classmethod
    def map_file(cls, fd: int) -> "Packed":
        """Map a memory file privately: buffers are writable, and no other process sees it."""
        mapping = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_PRIVATE)
        view = memoryview(mapping)
        (count,) = struct.unpack_from("<Q", view)
        sizes = struct.unpack_from(f"<{count}Q", view, 8)
        parts: list[memoryview] = []
        position = 8 * (count + 1)
        for size in sizes:
            position = _aligned(position)
            parts.append(view[position : position + size])
            position += size
        return cls(parts[0], tuple(parts[1:]))


def pack(
    parts: Sequence[tuple[str, object]], *, rank: int | None = None, hostname: str | None = None
) -> Packed:
    """Pickle one value, or a tuple of several; PayloadError names the part that cannot be."""
    values = tuple(value for _name, value in parts)
    buffers: list[pickle.PickleBuffer] = []
    try:
        stream = pickling.dumps(values[0] if len(values) == 1 else values, buffers.append)
    except Exception as error:
        path = find_culprit(parts)
        reason = f"{type(error).__name__}: {error}"
        raise PayloadError(path=path, reason=reason, rank=rank, hostname=hostname) from error
    return Packed(stream, tuple(buffer.raw() for buffer in buffers))


def memory_file(packed: Packed) -> int:
    """A new anonymous file that holds `packed`; it is gone with its last descriptor."""
    fd = os.memfd_create("torchrunx_ray_payload")
    try:
        packed.write_to(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def kept_packed() -> Generator[None]:
    """Within, a Packed that is unpickled stays one."""
    token = _keep_packed.set(True)
    try:
        yield
    finally:
        _keep_packed.reset(token)


def carry_values_packed() -> None:
    """Declare that this process only carries values, and must not import what they need."""
    global _process_only_carries
    _process_only_carries = True


def _arrive(stream: Any, *buffers: Any) -> Any:
    # Ray's buffers cannot be indexed; a memoryview of them can.
    packed = Packed(memoryview(stream), tuple(memoryview(buffer) for buffer in buffers))
    carries = _process_only_carries or "ray.util.client.server.server" in sys.modules
    return packed if carries or _keep_packed.get() else packed.unpack()


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _write_all(write: "Callable[[memoryview], int | None]", data: memoryview) -> None:
    while data.nbytes:
        data = data[write(data) or 0 :]
