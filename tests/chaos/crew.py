"""Workers of the training, as they announced themselves, and the processes around them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.training import Seen
from tests.processes import is_alive, parent, pids


@dataclass(frozen=True)
class Crew:
    """All ranks of one attempt."""

    attempt: int
    ranks: tuple[Seen, ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def lives(self) -> bool:
        return all(is_alive(seen.pid) for seen in self.ranks)


class Crews:
    """Reads the announcements in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._above: dict[str, dict[str, int]] = {}
        """Processes above the workers of one template, by its mark, as they were before any of them was killed."""

    def newest(self) -> Crew | None:
        """Return the last attempt whose ranks have all begun the function."""
        attempts = sorted({int(name.partition(".")[0]) for name in os.listdir(self._folder)})
        for attempt in reversed(attempts):
            paths = list(self._folder.glob(f"{attempt}.*"))
            ranks = [Seen(**json.loads(path.read_text())) for path in paths]
            if ranks and len(ranks) == ranks[0].world_size:
                for seen in ranks:
                    self._above.setdefault(seen.mark, seen.above)
                ranks.sort(key=lambda seen: seen.rank)
                return Crew(attempt, tuple(ranks))
        return None

    def above(self, seen: Seen) -> dict[str, int]:
        return self._above[seen.mark]

    def store_of(self, crew: Crew) -> int | None:
        """Return the process that serves the store, a child of the first host's template beside its workers."""
        template = self.above(crew.ranks[0])["template"]
        for pid in pids():
            try:
                if parent(pid) == template and os.getpgid(pid) == os.getpgid(template):
                    return pid
            except OSError:
                continue
        return None
