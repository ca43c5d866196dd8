"""Steps of the training, as its workers wrote them down."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """A step that a rank has taken."""

    attempt: int
    rank: int
    number: int
    digest: str
    at: float
    """Time in seconds since the epoch."""


class Journal:
    """Reads the file to which all workers append."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._first_at: dict[int, float] = {}
        self._last_at: dict[int, float] = {}

    def steps(self) -> Iterator[Step]:
        for line in self._path.read_text().splitlines():
            yield _step(line)

    def first_step_at(self, attempt: int) -> float | None:
        """Return the time of the first step that an attempt has taken."""
        self._go_on()
        return self._first_at.get(attempt)

    def last_step_at(self, attempt: int) -> float:
        """Return the time of the last step that an attempt has taken; 0 before the first."""
        self._go_on()
        return self._last_at.get(attempt, 0)

    def _go_on(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, _, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + 1 if whole else 0
        for line in whole.decode().splitlines():
            step = _step(line)
            self._first_at.setdefault(step.attempt, step.at)
            self._last_at[step.attempt] = step.at


def _step(line: str) -> Step:
    attempt, rank, number, digest, at = line.split()
    return Step(int(attempt), int(rank), int(number), digest, float(at))
