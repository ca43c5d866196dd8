"""The function and its arguments, held once per host for all its workers."""

import os

from torchrunx_ray.wire.messages import StartMethod
from torchrunx_ray.wire.values import memory, transfer
from torchrunx_ray.wire.values.payload import Packed
from torchrunx_ray.wire.values.transfer import Layout


class HeldCall:
    """Memory or a file that the agent fills before workers are forked.

    Forked workers inherit the memory, and copy pages when they write. Spawned workers map a file. If other
    processes may not write to this process's memory, all workers map a file.
    """

    def __init__(self, layout: Layout, start_method: StartMethod) -> None:
        self.layout = layout
        self._memory = None if start_method == "spawn" else memory.allocate(layout.size)
        self.fd = self._open()
        """Descriptor that the agent writes to: the file, or this process's memory from `address` on."""

    @property
    def address(self) -> int | None:
        """Address in this process's memory; None for a file."""
        return None if self._memory is None else memory.address_of(self._memory)

    def values(self) -> list[Packed]:
        """Return the values, which then keep the memory alive. Call once, in a forked worker."""
        if self._memory is None:
            return transfer.map_file(self.fd, self.layout)
        held, self._memory = self._memory, None
        os.close(self.fd)
        return self.layout.values_in(held)

    def drop(self) -> None:
        os.close(self.fd)
        if self._memory is not None:
            self._memory.close()

    def _open(self) -> int:
        if self._memory is not None:
            try:
                return memory.open_own()
            except OSError:
                self._memory = None
        return transfer.new_file(self.layout)
