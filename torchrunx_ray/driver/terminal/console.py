"""The driver's stdout and stderr, and the status lines at the bottom of a terminal."""

import contextlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, TextIO

from torchrunx_ray.driver.background.forks import in_child

TextStream = Literal["stdout", "stderr"]

_LONGEST = 2**16
"""Limit of an unfinished line that the driver itself prints. A longer line is shown in pieces."""


class Console:
    """The driver's stdout and stderr, shared by all runs of this process.

    A method may block as long as the terminal does, so that none is called in the event loop.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._statuses: dict[object, Callable[[], str]] = {}
        self._drawn: dict[object, str] = {}
        self._live: Any = None
        self._proxies: dict[TextStream, _Above] = {}

    def write(self, stream: TextStream, lines: str, target: TextIO | None = None) -> None:
        """Write whole lines to the stream's current file, or to `target`."""
        with self._lock:
            target = target or _file(stream)
            if target is None:
                return  # closed, as in `python train.py >&-`; Python's print ignores this, too
            text = _writable(lines, target)
            if self._live is not None and _is_terminal(target):
                from rich.segment import Segment, Segments

                # Written above the status lines, without rich's markup.
                raw = Segments([Segment(text)])
                self._live.console.print(raw, end="", soft_wrap=True)
            else:
                target.write(text)
                target.flush()

    def write_verbatim(
        self, whose: object, stream: TextStream, text: str, lines: str, drawn: str
    ) -> None:
        """Write a piece of text as it is.

        While there are status lines, write only the `lines` that the piece completes, and show `drawn`,
        the unfinished line, as a status line.
        """
        with self._lock:
            if self._live is None or not _is_terminal(_file(stream)):
                self.write(stream, text)
                return
            self.draw(whose, stream, drawn)
            if lines:
                self.write(stream, lines)

    def draw(self, whose: object, stream: TextStream, drawn: str) -> None:
        """Show an unfinished line beside the status lines. "" means that the line has ended."""
        with self._lock:
            self._drawn.pop((whose, stream), None)
            if drawn and self._live is not None:
                self._drawn[whose, stream] = drawn

    def has_colours(self, stream: TextStream) -> bool:
        """Return True if the stream is a terminal with colours. NO_COLOR is explained at no-color.org."""
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return not is_plain and _is_terminal(_file(stream))

    def add_status(self, whose: object, status: Callable[[], str]) -> None:
        """Show a status line, which is redrawn continuously. Needs rich."""
        with self._lock:
            self._statuses[whose] = status
            if self._live is None:
                self._begin_live()

    def remove_status(self, whose: object) -> None:
        with self._lock:
            self._statuses.pop(whose, None)
            if self._live is not None and not self._statuses:
                self._end_live()

    def forget(self) -> object:
        """Reset the state in a forked child, which has none of the parent's runs or threads. Return the old state."""
        inherited = vars(self).copy()
        self._remove_proxies()
        self.__init__()
        return inherited

    def _begin_live(self) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        on_stderr = RichConsole(file=_file("stderr"))
        # The driver's own output must also go above the status lines.
        streams: tuple[TextStream, ...] = ("stdout", "stderr")
        self._proxies = {
            stream: _Above(self, stream, file)
            for stream in streams
            if (file := _file(stream)) is not None and _is_terminal(file)
        }
        for stream, proxy in self._proxies.items():
            setattr(sys, stream, proxy)
        self._live = Live(
            console=on_stderr,
            get_renderable=self._text,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def _end_live(self) -> None:
        live, self._live = self._live, None
        try:
            live.stop()
        finally:
            self._drawn.clear()
            self._remove_proxies()

    def _remove_proxies(self) -> None:
        proxies, self._proxies = self._proxies, {}
        for stream, proxy in proxies.items():
            if getattr(sys, stream) is proxy:  # the driver may have replaced it
                setattr(sys, stream, proxy.file)
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or was closed
                proxy.let_go()

    def _text(self) -> Any:
        from rich.text import Text

        drawn, statuses = list(self._drawn.values()), list(self._statuses.values())
        lines = [*drawn, *(status() for status in statuses)]
        return Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")


class _Above:
    """A proxy of one of the driver's streams that writes whole lines above the status lines.

    A caller may keep the proxy after the status lines are gone. The proxy then only forwards.
    """

    def __init__(self, console: Console, stream: TextStream, file: TextIO) -> None:
        self.file = file
        self._console = console
        self._stream: TextStream = stream
        self._rest = ""
        self._is_let_go = False

    def write(self, text: str) -> int:
        if self._is_let_go:
            return self.file.write(text)
        lines, newline, rest = (self._rest + text).rpartition("\n")
        if len(rest) > _LONGEST:
            lines, newline, rest = lines + newline + rest, "\n", ""
        self._rest = _from_last_redraw(rest)
        # An unfinished line, such as a progress bar, is shown as a status line.
        self._console.draw(self, self._stream, self._rest.strip("\r").rpartition("\r")[2])
        if newline:
            # Written to its own file: the driver's replacement of the stream may write to this proxy.
            self._console.write(self._stream, lines + newline, self.file)
        return len(text)

    def let_go(self) -> None:
        self._is_let_go = True
        self.file.write(self._rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _from_last_redraw(rest: str) -> str:
    """Return the text from the carriage return before the last redraw on."""
    return rest[max(0, rest.rstrip("\r").rfind("\r")) :]


def can_be_live() -> bool:
    """Return True if stderr is a terminal on which a line can be redrawn."""
    return _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"


def has_rich() -> bool:
    """Return True if rich, an optional dependency, is installed."""
    return importlib.util.find_spec("rich") is not None


def _is_terminal(stream: Any) -> bool:
    """Return True for a terminal. The driver may have replaced its streams by any object."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # an object that can only write, or a closed file
        return False


def _file(stream: TextStream) -> TextIO | None:
    """Return the process's stream, without the proxy for status lines."""
    target = sys.stdout if stream == "stdout" else sys.stderr
    return target.file if isinstance(target, _Above) else target


def _writable(text: str, target: TextIO) -> str:
    """Escape characters that the stream's encoding lacks."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


console = Console()
"""The console of this process."""

in_child(console.forget)
