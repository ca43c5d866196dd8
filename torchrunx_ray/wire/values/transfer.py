"""Values between the processes of one host."""

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
"""Alignment of every buffer, as numpy and torch kernels like it."""


@dataclass(frozen=True)
class Spans:
    """Addresses of a value's parts in some process's memory; there may be very many."""

    addresses: "array.array[int]"
    sizes: "array.array[int]"


@dataclass(frozen=True)
class Layout:
    """Layout of values in one piece of memory: of each value, the sizes of its parts."""

    sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, values: Sequence[Packed]) -> "Layout":
        return cls(tuple(tuple(part.nbytes for part in packed.parts) for packed in values))

    @property
    def size(self) -> int:
        """In bytes, and at least one: no mapping is empty."""
        return max(1, self._ends()[-1])

    @property
    def offsets(self) -> list[int]:
        """Sizes of all parts of all values, in their order."""
        return self._ends()[:-1]

    def values_in(self, held: mmap.mmap) -> list[Packed]:
        """The values that lie there; they keep it mapped, and are writable if it is."""
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
    """Return the place of a value of this process, for `take`; valid for as long as the Packed is kept."""
    parts = packed.parts
    addresses = array.array("Q", map(memory.address_of, parts))
    return Spans(addresses, array.array("Q", (part.nbytes for part in parts)))


def take(remote: Remote, spans: Spans) -> Packed | None:
    """A copy of a value that another process offers; None where that has ended."""
    layout = Layout((tuple(spans.sizes),))
    taken = memory.allocate(layout.size)
    base = memory.address_of(taken)
    here = (base + offset for offset in layout.offsets)
    moves = zip(here, spans.addresses, spans.sizes, strict=True)
    return layout.values_in(taken)[0] if remote.read(moves) else None


def place(remote: Remote, base: int, values: Sequence[Packed]) -> None:
    """Copy values to `base` of another process's memory, in their `Layout`.

    Where that process has ended, whoever watches it will tell.
    """
    remote.write(_moves(base, values))


def place_in_file(fd: int, values: Sequence[Packed]) -> None:
    """Copy values into a file, in their `Layout`."""
    memory.write_file(fd, _moves(0, values))


def new_file(layout: Layout) -> int:
    """A file in memory, without a name in any folder, with room for these values."""
    fd = linux.memory_file("torchrunx_ray_values")
    try:
        os.ftruncate(fd, layout.size)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_file(fd: int, layout: Layout) -> list[Packed]:
    """Map a file privately: the values are writable, and no other process sees it. Closes it."""
    try:
        return layout.values_in(mmap.mmap(fd, layout.size, flags=mmap.MAP_PRIVATE))
    finally:
        os.close(fd)


def _moves(base: int, values: Sequence[Packed]) -> Iterator[Move]:
    parts = itertools.chain.from_iterable(packed.parts for packed in values)
    for part, offset in zip(parts, Layout.of(values).offsets, strict=True):
        yield memory.address_of(part), base + offset, part.nbytes
