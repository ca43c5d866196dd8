"""Times of one attempt, in little memory."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchrunx_ray.wire.ranks import Place


class RankTimes(NamedTuple):
    """Times of one rank, in ns since the epoch; 0 for a step that has not happened."""

    rank: int
    host_index: int
    joined: int
    started: int
    finished: int
    failed: int
    exited: int


_COLUMNS = len(RankTimes._fields)


@dataclass(frozen=True)
class AttemptTimes:
    """Times of one attempt, as plain numbers: a run may have hundreds of attempts."""

    number: int
    begun_ns: int
    """Time from which the workers could be started."""
    hostnames: tuple[str, ...]
    loaded: tuple[tuple[int, int, int], ...]
    """Host index, begin and end of each template's import."""
    _ranks: "array[int]"
    """The fields of RankTimes, rank after rank."""

    @classmethod
    def of(
        cls,
        number: int,
        begun_ns: int,
        hostnames: Sequence[str],
        places: Sequence[Place],
        loaded: Mapping[int, tuple[int, int]],
        steps: Sequence[Mapping[int, int]],
    ) -> "AttemptTimes":
        """Copy the times of an attempt. `steps` has the times by rank, in the order of RankTimes."""
        ranks = array("q")
        for place in places:
            ranks.extend([place.rank, place.host_index])
            ranks.extend(times.get(place.rank, 0) for times in steps)
        loads = tuple((host_index, *times) for host_index, times in loaded.items())
        return cls(number, begun_ns, tuple(hostnames), loads, ranks)

    def __len__(self) -> int:
        """Return the number of ranks."""
        return len(self._ranks) // _COLUMNS

    def __iter__(self) -> Iterator[RankTimes]:
        for begin in range(0, len(self._ranks), _COLUMNS):
            yield RankTimes(*self._ranks[begin : begin + _COLUMNS])
