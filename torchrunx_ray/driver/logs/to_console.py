"""A sink for the driver's own stdout and stderr."""

import logging
from collections.abc import Callable

from torchrunx_ray.driver.logs.speaker import LEVELS, Speaker, TextStream
from torchrunx_ray.driver.screen import screen
from torchrunx_ray.wire.records import WorkerRecord

_COLOURS = (36, 33, 32, 35, 34, 31)
"""Of ranks on a terminal, in turn, as ANSI counts them."""


class ToConsole:
    """Verbatim where one rank is shown; else each line after whose it is."""

    def __init__(self, takes: Callable[[Speaker], bool], *, shows_many: bool) -> None:
        self._takes = takes
        self._shows_many = shows_many

    level = logging.INFO

    def is_verbatim(self, who: Speaker) -> bool:
        """Whether it takes what this one says just as it comes, also parts of lines."""
        return not self._shows_many and who.rank is not None

    def as_written(
        self, who: Speaker, stream: TextStream, text: str, lines: str, drawn: str
    ) -> None:
        """See `Screen.write_verbatim`."""
        if self._takes(who) and LEVELS[stream] >= who.logger_level():
            screen.write_verbatim(stream, text, lines, drawn)

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:  # noqa: ARG002
        if self._takes(who) and LEVELS[stream] >= who.logger_level():
            head = self._head(who, stream)
            if head:
                lines = head + lines[:-1].replace("\n", "\n" + head) + "\n"
            screen.write(stream, lines)

    def record(self, who: Speaker, record: WorkerRecord) -> None:
        if self._takes(who) and record.least_level >= (who.logger_level() or logging.INFO):
            text = record.text
            if not record.is_configured:
                text = f"{record.level_name}:{record.logger}:{text}"
            screen.write("stderr", f"{self._head(who, 'stderr')}{text}\n")

    def close(self) -> None:
        """The streams are the driver's."""

    def _head(self, who: Speaker, stream: TextStream) -> str:
        if self.is_verbatim(who):
            return ""
        head = f"[{who.label}]"
        if screen.has_colours(stream) and who.rank is not None:
            head = f"\x1b[{_COLOURS[who.rank % len(_COLOURS)]}m{head}\x1b[0m"
        return head + " "
