"""Values of a launch, fetched on access."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError

from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.report.trace import write_trace
from torchrunx_ray.errors import AgentFailedError, LaunchError, PayloadError, bytes_in_words
from torchrunx_ray.wire import foreign_errors
from torchrunx_ray.wire.values.culprit import users_part
from torchrunx_ray.wire.values.payload import kept_packed

R = TypeVar("R")


@dataclass(frozen=True)
class Value:
    """A rank's value: Ray's reference to the value, its size, and the node of the rank."""

    ref: "ray.ObjectRef[Any]"
    size: int
    node: Node


class LaunchResult(Generic[R]):
    """Every rank's return value, still in the cluster.

    Each access fetches the value, so keep a value that you use twice. Values stay in the cluster while this
    object or one of its refs lives, even after the workers have ended.
    """

    def __init__(
        self,
        hostnames: Sequence[str],
        values: Sequence[Sequence[Value]],
        timeline: Timeline,
        log_directory: Path | None,
        attempts: Sequence[AttemptRecord] = (),
    ) -> None:
        self._attempts = tuple(attempts)
        self._hostnames = tuple(hostnames)
        self._values = values
        self._by_rank = [(i, k) for i, host in enumerate(values) for k in range(len(host))]
        """Host index and local rank of each rank."""
        self._timeline = timeline
        self._log_directory = log_directory

    @property
    def hostnames(self) -> tuple[str, ...]:
        """The hosts in the order of their ranks."""
        return self._hostnames

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each phase of the launch in order, and "total"."""
        return self._timeline.seconds

    @property
    def attempts(self) -> tuple[AttemptRecord, ...]:
        """All attempts of the run; the last one returned the values."""
        return self._attempts

    @property
    def log_directory(self) -> Path | None:
        """Directory of the default log files; None if the launch wrote none."""
        return self._log_directory

    def timeline(self, path: str | os.PathLike[str]) -> None:
        """Write the times of each rank's phases, in all attempts, as a trace for ui.perfetto.dev."""
        write_trace(path, self._timeline, self._attempts)

    def ref(self, rank: int) -> "ray.ObjectRef[R]":
        """Return the reference to one rank's value. `ray.get` fetches the value anywhere in the cluster."""
        host_index, local_rank = self._find(rank)
        return self._values[host_index][local_rank].ref

    def rank(self, rank: int) -> R:
        """Return one rank's value."""
        host_index, local_rank = self._find(rank)
        hostname = self._hostnames[host_index]
        value = self._values[host_index][local_rank]
        if not ray.is_initialized():
            raise _gone(rank)  # ray.get would start another cluster
        try:
            with kept_packed():
                packed: Any = ray.get(value.ref)
        except ValueError as error:
            if not foreign_errors.is_of_another_cluster(str(error)):
                raise
            raise _gone(rank) from error  # the value was in an earlier cluster
        except RayError as error:
            if foreign_errors.is_store_full(str(error)):
                store = bytes_in_words(value.node.store_size)
                raise PayloadError(
                    path="the return value",
                    reason=f"it has {bytes_in_words(value.size)}; the node's object store has {store}, "
                    "and the disk that Ray falls back to is full",
                    step="store",
                    rank=rank,
                    hostname=hostname,
                ) from error
            what = f"the value that rank {rank} returned is lost"
            raise AgentFailedError(hostname=hostname, what=what, evidence=str(error)) from error
        try:
            return packed.unpack()
        except (Exception, SystemExit, GeneratorExit) as error:  # Ctrl-C is meant for the driver
            raise PayloadError(
                path="the return value",
                reason=f"{type(error).__name__}: {error}",
                rank=rank,
                hostname=hostname,
                step="unpickle",
                missing_module=error.name if isinstance(error, ModuleNotFoundError) else None,
            ) from users_part(error)

    def index(self, hostname: str, local_rank: int) -> R:
        """Return the value of the worker with this hostname and local rank."""
        if hostname not in self._hostnames:
            raise KeyError(
                f"{hostname!r} is not a host of this launch; its hosts are {self._hostnames}"
            )
        host_index = self._hostnames.index(hostname)
        workers = len(self._values[host_index])
        if not 0 <= local_rank < workers:
            raise IndexError(f"{hostname} had local ranks 0 to {workers - 1}, not {local_rank}")
        return self.rank(sum(map(len, self._values[:host_index])) + local_rank)

    @property
    def results(self) -> dict[str, list[R]]:
        """All values, by host and local rank."""
        return {
            hostname: [self.index(hostname, i) for i in range(len(values))]
            for hostname, values in zip(self._hostnames, self._values, strict=True)
        }

    def __len__(self) -> int:
        return len(self._by_rank)

    def __iter__(self) -> Iterator[R]:
        return (self.rank(rank) for rank in range(len(self)))

    def __repr__(self) -> str:
        return f"<LaunchResult of {len(self)} ranks on {', '.join(self._hostnames)}>"

    def _find(self, rank: int) -> tuple[int, int]:
        if not 0 <= rank < len(self):
            raise IndexError(f"this launch had ranks 0 to {len(self) - 1}, not {rank}")
        return self._by_rank[rank]


def _gone(rank: int) -> LaunchError:
    return LaunchError(
        f"the value that rank {rank} returned is gone, because the driver has left the Ray cluster: by "
        "ray.shutdown(), or because its ray:// connection was lost. Fetch the values that you need before that."
    )
