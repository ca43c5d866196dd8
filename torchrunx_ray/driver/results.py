"""What a launch returned, fetched when it is asked for."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError

from torchrunx_ray.errors import AgentFailedError, PayloadError
from torchrunx_ray.wire.payload import kept_packed

R = TypeVar("R")


class LaunchResult(Generic[R]):
    """Every rank's return value, still in the cluster.

    Values are fetched on each access, so keep what you use twice. They stay in the cluster for
    as long as this object or one of its refs lives, whatever becomes of the workers.
    """

    def __init__(
        self, hostnames: Sequence[str], refs: "Sequence[Sequence[ray.ObjectRef[R]]]"
    ) -> None:
        self._hostnames = tuple(hostnames)
        self._refs = [list(refs_of_host) for refs_of_host in refs]

    @property
    def hostnames(self) -> tuple[str, ...]:
        """The hosts, in the order of their ranks."""
        return self._hostnames

    def ref(self, rank: int) -> "ray.ObjectRef[R]":
        """The reference to one rank's value: `ray.get` of it is the value, anywhere in the cluster."""
        host_index, local_rank = self._find(rank)
        return self._refs[host_index][local_rank]

    def rank(self, rank: int) -> R:
        """One rank's value."""
        host_index, local_rank = self._find(rank)
        return self._fetch(rank, host_index, local_rank)

    def index(self, hostname: str, local_rank: int) -> R:
        """The value of the worker at a place."""
        if hostname not in self._hostnames:
            raise KeyError(f"{hostname!r} is no host of this launch; those are {self._hostnames}")
        host_index = self._hostnames.index(hostname)
        workers = len(self._refs[host_index])
        if not 0 <= local_rank < workers:
            raise IndexError(f"{hostname} had local ranks 0 to {workers - 1}, not {local_rank}")
        rank = sum(map(len, self._refs[:host_index])) + local_rank
        return self._fetch(rank, host_index, local_rank)

    @property
    def results(self) -> dict[str, list[R]]:
        """All values, by host and local rank."""
        return {
            hostname: [self.index(hostname, i) for i in range(len(refs))]
            for hostname, refs in zip(self._hostnames, self._refs, strict=True)
        }

    def __len__(self) -> int:
        return sum(map(len, self._refs))

    def __iter__(self) -> Iterator[R]:
        return (self.rank(rank) for rank in range(len(self)))

    def __repr__(self) -> str:
        return f"<LaunchResult of {len(self)} ranks on {', '.join(self._hostnames)}>"

    def _find(self, rank: int) -> tuple[int, int]:
        if not 0 <= rank < len(self):
            raise IndexError(f"this launch had ranks 0 to {len(self) - 1}, not {rank}")
        local_rank = rank
        for host_index, refs in enumerate(self._refs):
            if local_rank < len(refs):
                return host_index, local_rank
            local_rank -= len(refs)
        raise AssertionError(rank)

    def _fetch(self, rank: int, host_index: int, local_rank: int) -> R:
        hostname = self._hostnames[host_index]
        try:
            with kept_packed():
                packed: Any = ray.get(self._refs[host_index][local_rank])
        except RayError as error:
            what = f"the value that rank {rank} returned is lost"
            raise AgentFailedError(hostname=hostname, what=what, evidence=str(error)) from error
        try:
            return packed.unpack()
        except Exception as error:
            raise PayloadError(
                path="the return value",
                reason=f"{type(error).__name__}: {error}",
                rank=rank,
                hostname=hostname,
                step="unpickle",
                missing_module=error.name if isinstance(error, ModuleNotFoundError) else None,
            ) from error
