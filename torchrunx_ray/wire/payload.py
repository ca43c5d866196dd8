"""Values on their way between driver and workers."""

import contextlib
import functools
import mmap
import os
import pickle
import struct
import sys
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire import pickling
from torchrunx_ray.wire.culprit import find_culprit

_ALIGNMENT = 64
"""Of every buffer in a memory file, as numpy and torch kernels like it."""

_keep_packed: ContextVar[bool] = ContextVar("_keep_packed", default=False)
_process_only_carries = False
_inserted: ContextVar[Sequence[Callable[[], Any]]] = ContextVar("_inserted", default=())


class Packed:
    """A pickled value: its pickle stream, and its large buffers beside it.

    Wherever a Packed is itself unpickled it turns into the value, except in a process that only
    carries values (an agent, a Ray Client server) and inside `kept_packed()`.
    """

    __slots__ = ("_owners", "buffers", "stream")

    def __init__(
        self,
        stream: "bytes | memoryview",
        buffers: "tuple[memoryview, ...]" = (),
        owners: Sequence[object] = (),
    ) -> None:
        self.stream = stream
        self.buffers = buffers
        self._owners = owners

    def unpack(self, inserted: "Sequence[Packed]" = ()) -> Any:
        """The value, with these in the places that `Inserted` holds for them."""
        token = _inserted.set([functools.cache(packed.unpack) for packed in inserted])
        try:
            return pickle.loads(self.stream, buffers=self.buffers)
        finally:
            _inserted.reset(token)

    @property
    def parts(self) -> "list[memoryview]":
        return [memoryview(part).cast("B") for part in (self.stream, *self.buffers)]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(part.nbytes for part in self.parts)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if protocol < 5:  # Ray Client may ask for less than out-of-band buffers need
            return _arrive, (bytes(self.stream), *map(bytes, self.buffers))
        return _arrive, tuple(pickle.PickleBuffer(part) for part in (self.stream, *self.buffers))


@dataclass(frozen=True)
class Inserted:
    """The place of a value that travels beside the one that refers to it."""

    index: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _insert, (self.index,)


def pack(
    parts: Sequence[tuple[str, object]],
    *,
    rank: int | None = None,
    hostname: str | None = None,
    replace: pickling.Replace | None = None,
) -> Packed:
    """Pickle one value, or a tuple of several; PayloadError names the part that cannot be."""
    values = tuple(value for _name, value in parts)
    try:
        pickled = pickling.dumps_with_buffers(values[0] if len(values) == 1 else values, replace)
    except Exception as error:
        path = find_culprit(parts, replace)
        reason = f"{type(error).__name__}: {error}"
        raise PayloadError(path=path, reason=reason, rank=rank, hostname=hostname) from error
    buffers = tuple(buffer.raw() for buffer in pickled.buffers)
    return Packed(pickled.stream, buffers, pickled.owners)


def memory_file(*values: Packed) -> int:
    """A new anonymous file that `map_memory_file` reads; it is gone with its last descriptor."""
    fd = os.memfd_create("torchrunx_ray_payload")
    try:
        _write(fd, [packed.parts for packed in values])
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_memory_file(fd: int) -> list[Packed]:
    """Map a memory file privately: buffers are writable, and no other process sees it."""
    view = memoryview(mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_PRIVATE))
    position = 8
    layout: list[tuple[int, ...]] = []
    for _ in range(struct.unpack_from("<Q", view)[0]):
        (count,) = struct.unpack_from("<Q", view, position)
        layout.append(struct.unpack_from(f"<{count}Q", view, position + 8))
        position += 8 * (1 + count)
    values: list[Packed] = []
    for sizes in layout:
        parts: list[memoryview] = []
        for size in sizes:
            position = _aligned(position)
            parts.append(view[position : position + size])
            position += size
        values.append(Packed(parts[0], tuple(parts[1:])))
    return values


def _write(fd: int, values: "Sequence[Sequence[memoryview]]") -> None:
    """The number of values, of each the number of its parts and their sizes; then all parts."""
    table = [len(values)]
    for parts in values:
        table += [len(parts), *(part.nbytes for part in parts)]
    # By write, not through a mapping: that is several times slower on fresh memory.
    with open(fd, "wb", buffering=0, closefd=False) as file:
        _write_all(file.write, memoryview(struct.pack(f"<{len(table)}Q", *table)))
        for part in (part for parts in values for part in parts):
            file.seek(_aligned(file.tell()))
            _write_all(file.write, part)
        # A trailing empty buffer leaves the file short of the position it stands for.
        file.truncate(max(file.tell(), os.fstat(fd).st_size))


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


def _insert(index: int) -> Any:
    return _inserted.get()[index]()


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _write_all(write: "Callable[[memoryview], int | None]", data: memoryview) -> None:
    while data.nbytes:
        data = data[write(data) or 0 :]
