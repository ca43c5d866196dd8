"""The streams that the driver has, and the status lines at the foot of a terminal."""

import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, TextIO

TextStream = Literal["stdout", "stderr"]


class Screen:
    """Shared by all runs of this process; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._statuses: dict[object, Callable[[], str]] = {}
        self._live: Any = None
        self._drawn = ""

    def write(self, stream: TextStream, lines: str) -> None:
        """Whole lines."""
        with self._lock:
            target = _target(stream)
            text = _writable(lines, target)
            if self._live is not None and target.isatty():
                # Above the status lines; as it is, without rich's own reading of it.
                self._live.console.print(_Raw(text), end="", soft_wrap=True)
            else:
                target.write(text)
                target.flush()

    def write_verbatim(self, stream: TextStream, text: str, lines: str, drawn: str) -> None:
        """What came, the whole lines that are in it, and the line that is still drawn anew.

        Beside status lines, that line is one of them.
        """
        with self._lock:
            if self._live is None or not _target(stream).isatty():
                self.write(stream, text)
                return
            self._drawn = drawn
            if lines:
                self.write(stream, lines)

    def has_colours(self, stream: TextStream) -> bool:
        """See no-color.org."""
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return not is_plain and _target(stream).isatty()

    def add_status(self, whose: object, status: Callable[[], str]) -> None:
        """Show a line that is drawn anew all the time; needs rich."""
        with self._lock:
            self._statuses[whose] = status
            if self._live is None:
                self._live = _new_live(self._text)

    def remove_status(self, whose: object) -> None:
        with self._lock:
            self._statuses.pop(whose, None)
            if self._live is not None and not self._statuses:
                live, self._live = self._live, None
                live.stop()
                self._drawn = ""

    def _text(self) -> Any:
        from rich.text import Text

        drawn = [self._drawn] if self._drawn else []
        lines = [*drawn, *(status() for status in list(self._statuses.values()))]
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


class _Raw:
    """Text that rich is to print as it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, _console: object, _options: object) -> Any:
        from rich.segment import Segment

        yield Segment(self._text)


def can_be_live() -> bool:
    """Whether stderr is a terminal on which a line can be drawn anew."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def has_rich() -> bool:
    """It is an extra."""
    return importlib.util.find_spec("rich") is not None


def _new_live(text: Callable[[], Any]) -> Any:
    from rich.console import Console
    from rich.live import Live

    live = Live(
        console=Console(stderr=True),
        get_renderable=text,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=True,
    )
    live.start()
    return live


def _target(stream: TextStream) -> TextIO:
    return sys.stdout if stream == "stdout" else sys.stderr


def _writable(text: str, target: TextIO) -> str:
    """What the stream's encoding lacks is escaped, not lost."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


screen = Screen()
"""Of this process."""
