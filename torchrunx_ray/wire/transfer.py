"""Values between the processes of one host."""

import itertools
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchrunx_ray.wire import memory
from torchrunx_ray.wire.memory import Remote, Span
from torchrunx_ray.wire.payload import Packed

_ALIGNMENT = 64
"""Of every buffer, as numpy and torch kernels like it."""


@dataclass(frozen=True)
class Layout:
    """How values lie in one piece of memory: of each value, the sizes of its parts."""

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
        """Of all parts of all values, in their order."""
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


def offer(own_memory: int, packed: Packed) -> tuple[tuple[Span, ...], Packed]:
    """Where a value of this process lies, for `take`; valid for as long as the Packed is kept.

    What cannot be read from outside is copied for that.
    """
    parts = [
        part if memory.is_readable(own_memory, part) else memoryview(bytes(part))
        for part in packed.parts
    ]
    spans = tuple(Span(memory.address_of(part), part.nbytes) for part in parts)
    return spans, Packed(parts[0], tuple(parts[1:]), owners=[packed])


def take(remote: Remote, spans: Sequence[Span]) -> Packed | None:
    """A copy of a value that another process offers; None where that has ended."""
    layout = Layout((tuple(span.size for span in spans),))
    (packed,) = layout.values_in(memory.allocate(layout.size))
    addresses = [span.address for span in spans]
    return packed if remote.read(zip(packed.parts, addresses, strict=True)) else None


def place(remote: Remote, base: int, values: Sequence[Packed]) -> None:
    """Copy values to `base` of another process's memory, in their `Layout`.

    Where that process has ended, whoever watches it will tell.
    """
    remote.write(_placed(base, values))


def place_in_file(fd: int, values: Sequence[Packed]) -> None:
    """Copy values into a file, in their `Layout`."""
    memory.write_file(fd, _placed(0, values))


def _placed(base: int, values: Sequence[Packed]) -> "Iterator[tuple[memoryview, int]]":
    parts = itertools.chain.from_iterable(packed.parts for packed in values)
    return zip(parts, (base + offset for offset in Layout.of(values).offsets), strict=True)
