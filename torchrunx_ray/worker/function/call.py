"""The function and its arguments, once per host, for every worker's own use."""

import os

from torchrunx_ray.wire.messages import StartMethod
from torchrunx_ray.wire.values import memory, transfer
from torchrunx_ray.wire.values.payload import Packed
from torchrunx_ray.wire.values.transfer import Layout


class HeldCall:
    """Room that the agent fills before workers are forked.

    Forked workers inherit it as their own memory, copied where they write. Spawned ones map a file,
    and so do all where this process's memory may not be written to from outside.
    """

    def __init__(self, layout: Layout, start_method: StartMethod) -> None:
        self.layout = layout
        self._memory = None if start_method == "spawn" else memory.allocate(layout.size)
        self.fd = self._open()
        """The place that the agent writes to: the file, or this process's memory from `address` on."""

    @property
    def address(self) -> int | None:
        """None where it is a file."""
        return None if self._memory is None else memory.address_of(self._memory)

    def values(self) -> list[Packed]:
        """In a forked worker, once: they keep the memory, this no longer does."""
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
