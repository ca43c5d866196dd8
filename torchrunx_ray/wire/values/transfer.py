"""Transfer of values between the processes of one host."""

import array
import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchrunx_ray.wire import linux
from torchrunx_ray.wire.values import memory
from torchrunx_ray.wire.values.memory import Move, Remote
from torchrunx_ray.wire.values.payload import Packed

_ALIGNMENT = 64
"""Alignment of every buffer, which suits the kernels of numpy and torch."""


@dataclass(frozen=True)
class Spans:
    """Addresses and sizes of a value's parts in a process's memory. Arrays, since there may be very many parts."""

    addresses: "array.array[int]"
    sizes: "array.array[int]"


@dataclass(frozen=True)
class Layout:
    """Layout of values in one piece of memory: for each value, the sizes of its parts."""

    sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, values: Sequence[Packed]) -> "Layout":
        return cls(tuple(tuple(part.nbytes for part in packed.parts) for packed in values))

    @property
    def size(self) -> int:
        """Size in bytes, at least one, since no mapping is empty."""
        return max(1, self._ends()[-1])

    @property
    def offsets(self) -> list[int]:
        """Offsets of all parts of all values, in their order."""
        return self._ends()[:-1]

    def values_in(self, held: mmap.mmap) -> list[Packed]:
        """Return the values in this memory. They keep it mapped, and are writable if the memory is."""
        view = memoryview(held)
        offsets = iter(self.offsets)
        values: list[Packed] = []
        for sizes in self.sizes:
            parts = [view[offset : offset + size] for size, offset in zip(sizes, offsets)]  # noqa: B905  # the next value's follow
            values.append(Packed(parts[0], tuple(parts[1:])))
        return values

    def _ends(self) -> list[int]:
        sizes = itertools.chain.from_iterable(self.sizes)
        padded = (-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)
        return list(itertools.accumulate(padded, initial=0))


def offer(packed: Packed) -> Spans:
    """Return a value's location in this process, for `take`; valid as long as the Packed lives."""
    parts = packed.parts
    addresses = array.array("Q", map(memory.address_of, parts))
    return Spans(addresses, array.array("Q", (part.nbytes for part in parts)))


def take(remote: Remote, spans: Spans) -> Packed | None:
    """Return a copy of a value that another process offers; None if that process has ended."""
    layout = Layout((tuple(spans.sizes),))
    taken = memory.allocate(layout.size)
    base = memory.address_of(taken)
    here = (base + offset for offset in layout.offsets)
    pieces = zip(here, spans.addresses, spans.sizes, strict=True)
    return layout.values_in(taken)[0] if remote.read(pieces) else None


def new_file(layout: Layout) -> int:
    """Return the descriptor of a new file in memory with room for these values."""
    fd = linux.memory_file("torchrunx_ray_values")
    try:
        os.ftruncate(fd, layout.size)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_file(fd: int, layout: Layout) -> list[Packed]:
    """Map a file and return its values. Writes to them are private to this process. Closes the descriptor."""
    try:
        return layout.values_in(mmap.mmap(fd, layout.size, flags=mmap.MAP_PRIVATE))
    finally:
        os.close(fd)


def moves(base: int, values: Sequence[Packed]) -> Iterator[Move]:
    """Yield the moves that copy values from this process to `base` elsewhere, in their `Layout`."""
    parts = itertools.chain.from_iterable(packed.parts for packed in values)
    for part, offset in zip(parts, Layout.of(values).offsets, strict=True):
        yield memory.address_of(part), base + offset, part.nbytes
