"""The function and its arguments, once per host, for every worker's own use."""

import mmap
import os

from torchrunx_ray.wire import memory
from torchrunx_ray.wire.messages import StartMethod
from torchrunx_ray.wire.payload import Packed
from torchrunx_ray.wire.transfer import Layout


class HeldCall:
    """Room that the agent fills before workers are forked.

    Forked workers inherit it as their own memory, copied where they write; spawned ones map a file.
    """

    def __init__(self, layout: Layout, start_method: StartMethod) -> None:
        self.layout = layout
        self.fd: int | None = None
        """The file, for workers that are spawned."""
        self._memory: mmap.mmap | None = None
        if start_method == "spawn":
            self.fd = os.memfd_create("torchrunx_ray_call")
            os.ftruncate(self.fd, layout.size)
        else:
            self._memory = memory.allocate(layout.size)

    def open(self) -> tuple[int, int | None]:
        """A descriptor to write to: a file, or this process's memory and the address there."""
        if self._memory is None:
            assert self.fd is not None
            return os.dup(self.fd), None
        return memory.open_own(), memory.address_of(self._memory)

    def values(self) -> list[Packed]:
        """In a worker, once: they keep the memory, this no longer does."""
        held, self._memory = self._memory, None
        assert held is not None
        return self.layout.values_in(held)

    def drop(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
        elif self._memory is not None:
            self._memory.close()


def map_file(fd: int, layout: Layout) -> list[Packed]:
    """Map a file privately: buffers are writable, and no other process sees it."""
    mapped = mmap.mmap(fd, layout.size, flags=mmap.MAP_PRIVATE)
    os.close(fd)
    return layout.values_in(mapped)
