"""A sink that writes each worker's output to a file, to the console, or to both, as torchrun does."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from torchrunx_ray.driver.output.lines import Cut
from torchrunx_ray.driver.output.speaker import Sink, Speaker
from torchrunx_ray.driver.terminal.console import TextStream
from torchrunx_ray.wire.records import WorkerRecord


@dataclass(frozen=True)
class Destinations:
    """The places for the output of one attempt's workers. Workers are known by their index in the attempt."""

    files: Mapping[TextStream, Mapping[int, str]]
    """Paths by worker; "" stands for the console."""
    tees: Mapping[TextStream, Sequence[int]]
    """Workers whose lines are shown on the console, besides their file."""
    prefixes: Mapping[int, str]
    """Texts before the lines of these workers."""
    filters: Mapping[TextStream, Sequence[str]]
    filtered: Mapping[TextStream, Mapping[int, str]]
    """Paths, by worker, of files with those lines that contain one of the filters. Workers may share a file."""
    first_rank: int = 0
    """Rank of the worker with index 0."""


@dataclass
class _Open:
    """The destinations of the attempt whose output is written now, with their files."""

    places: Destinations
    files: dict[str, TextIO] = field(default_factory=dict[str, TextIO])

    def file(self, path: str) -> TextIO:
        if path not in self.files:
            self.files[path] = open(  # noqa: SIM115  # open for as long as the attempt
                path, "w", encoding="utf-8", errors="backslashreplace"
            )
        return self.files[path]

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class ToDestinations(Sink):
    """A sink for all attempts of a run. Each one's output goes to its own destinations."""

    def __init__(self) -> None:
        self._expected: dict[int, Destinations] = {}
        self._now: _Open | None = None
        # As torch does, which shows the lines where sys.stdout was at the start.
        self._console: Mapping[TextStream, TextIO] = {"stdout": sys.stdout, "stderr": sys.stderr}

    def expect(self, attempt: int, destinations: Destinations) -> None:
        """Note the destinations of an attempt before it begins. Any thread may call this."""
        self._expected[attempt] = destinations

    def begin_attempt(self, number: int) -> None:
        self.close()
        self._now = _Open(self._expected.pop(number))
        for paths in self._now.places.files.values():
            for path in filter(None, paths.values()):
                self._now.file(path)  # there, even if the worker says nothing

    def chunk(self, who: Speaker, stream: TextStream, cut: Cut, time_s: float) -> None:  # noqa: ARG002
        now = self._now
        if now is None or who.rank is None:
            self._show(stream, cut.verbatim)
            return
        index = who.rank - now.places.first_rank
        path = now.places.files[stream].get(index, "")
        if not path:
            self._show(stream, cut.verbatim)
            return
        file = now.file(path)
        file.write(cut.verbatim)
        file.flush()
        if index in now.places.tees[stream] and cut.lines:
            head = now.places.prefixes[index]
            lines = cut.lines.splitlines(keepends=True)
            self._show(stream, "".join(f"{head}{line}" for line in lines))
            self._filter(now, stream, index, lines)

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:  # noqa: ARG002
        self._show(stream, lines)

    def record(self, who: Speaker, record: WorkerRecord) -> None:
        """Take no records: workers with this sink write their own."""

    def close(self) -> None:
        if self._now is not None:
            self._now.close()
        self._now = None

    def _filter(self, now: _Open, stream: TextStream, index: int, lines: Sequence[str]) -> None:
        filters = now.places.filters[stream]
        if filters:
            file = now.file(now.places.filtered[stream][index])
            head = now.places.prefixes[index]
            wanted = [line for line in lines if any(each in line for each in filters)]
            file.writelines(f"{head}{line}" for line in wanted)
            file.flush()

    def _show(self, stream: TextStream, text: str) -> None:
        if text:
            self._console[stream].write(text)
            self._console[stream].flush()
