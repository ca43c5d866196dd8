"""A sink for the driver's own stdout and stderr."""

from collections.abc import Callable

from torchrunx_ray.driver.output.lines import Cut
from torchrunx_ray.driver.output.speaker import LEVELS, Sink, Speaker, TextStream
from torchrunx_ray.driver.report.progress import living
from torchrunx_ray.driver.terminal.console import console
from torchrunx_ray.wire.records import WorkerRecord

_COLOURS = (36, 33, 32, 35, 34, 31)
"""ANSI codes of the colours of ranks on a terminal, used in turn."""


class ToConsole(Sink):
    """A sink that writes output verbatim while only one rank of one run is shown.

    Otherwise each line has a prefix that names its source.
    """

    def __init__(
        self, run_name: str, takes: Callable[[Speaker], bool], *, shows_many: Callable[[], bool]
    ) -> None:
        """`shows_many` returns True while several ranks are shown; an elastic run may get more."""
        self._run_name = run_name
        self._takes = takes
        self._shows_many = shows_many
        self._in_line: dict[tuple[Speaker, TextStream], bool] = {}
        """Streams in the middle of a line, and whether that line is shown verbatim."""

    def chunk(self, who: Speaker, stream: TextStream, cut: Cut, time_s: float) -> None:
        """Write a single rank's output verbatim, including a line that is redrawn."""
        is_verbatim = self._in_line.pop((who, stream), self._is_verbatim(who))
        if cut.verbatim and not cut.verbatim.endswith("\n"):
            self._in_line[who, stream] = is_verbatim
        if not is_verbatim:
            super().chunk(who, stream, cut, time_s)
        elif self._takes(who) and LEVELS[stream] >= who.logger_level():
            console.write_verbatim(self, stream, cut.verbatim, cut.lines, cut.drawn)

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:  # noqa: ARG002
        if self._takes(who) and LEVELS[stream] >= who.logger_level():
            console.write(stream, self._headed(who, stream, lines))

    def record(self, who: Speaker, record: WorkerRecord) -> None:
        if self._takes(who) and record.least_level >= who.record_level:
            text = record.text
            if not record.is_configured:
                text = f"{record.level_name}:{record.logger}:{text}"
            console.write("stderr", self._headed(who, "stderr", text + "\n"))

    def _is_verbatim(self, who: Speaker) -> bool:
        return not self._shows_many() and who.rank is not None and len(living) <= 1

    def _headed(self, who: Speaker, stream: TextStream, lines: str) -> str:
        if self._is_verbatim(who):
            return lines
        head = f"[{self._run_name} {who.label}]" if len(living) > 1 else f"[{who.label}]"
        if console.has_colours(stream) and who.rank is not None:
            head = f"\x1b[{_COLOURS[who.rank % len(_COLOURS)]}m{head}\x1b[0m"
        return f"{head} " + lines[:-1].replace("\n", f"\n{head} ") + "\n"
