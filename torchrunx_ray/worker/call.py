"""The function and its arguments, once per host, for every worker's own use."""

import mmap
import os

from torchrunx_ray.wire import memory, transfer
from torchrunx_ray.wire.messages import StartMethod
from torchrunx_ray.wire.payload import Packed
from torchrunx_ray.wire.transfer import Layout


class HeldCall:
    """Room that the agent fills before workers are forked.

    Forked workers inherit it as their own memory, copied where they write. Spawned ones map a file,
    and so do all where this process's memory may not be written to from outside.
    """

    def __init__(self, layout: Layout, start_method: StartMethod) -> None:
        self.layout = layout
        self._memory: mmap.mmap | None = None
        self._file: int | None = None
        self._own_memory: int | None = None
        if start_method == "fork":
            try:
                self._own_memory = memory.open_own()
            except OSError:
                pass
        if self._own_memory is None:
            self._file = transfer.new_file(layout)
        else:
            self._memory = memory.allocate(layout.size)

    @property
    def fd(self) -> int:
        """What the agent writes to: the file, or this process's memory from `address` on."""
        fd = self._file if self._own_memory is None else self._own_memory
        assert fd is not None
        return fd

    @property
    def address(self) -> int | None:
        """None where it is a file."""
        return None if self._memory is None else memory.address_of(self._memory)

    def values(self) -> list[Packed]:
        """In a forked worker, once: they keep the memory, this no longer does."""
        if self._file is not None:
            file, self._file = self._file, None
            return transfer.map_file(file, self.layout)
        held, self._memory = self._memory, None
        assert held is not None
        assert self._own_memory is not None
        os.close(self._own_memory)
        return self.layout.values_in(held)

    def drop(self) -> None:
        os.close(self.fd)
        if self._memory is not None:
            self._memory.close()
