"""Splitting of a stream's bytes into whole lines."""

import codecs
import time
from dataclasses import dataclass

_LONGEST = 16 * 2**20
"""Limit of a line's length. A longer line is passed on in pieces, to bound the driver's memory."""

_REDRAWN_S = 5.0
"""Interval at which a line that is redrawn, such as a progress bar, is passed on as a line."""


@dataclass(frozen=True)
class Cut:
    """The part of a stream that a piece of it has completed."""

    verbatim: str
    """Whole lines as they were written. A redrawn line comes as it is written, and a very long one in pieces."""
    lines: str
    """Whole lines, each as it was drawn last. At intervals this includes a redrawn line that has not ended."""
    drawn: str
    """The current text of a redrawn line that has not ended, else ""."""


class LineCutter:
    """Splits one stream of one worker into lines."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest: list[str] = []
        """Pieces of the unfinished line, from its last redraw on."""
        self._size = 0
        self._is_redrawn = False
        """True if the unfinished line has a carriage return; such a line is passed on verbatim at once."""
        self._taken: str | None = None
        """The text of the unfinished, redrawn line that was last passed on as a line."""
        self._taken_at = time.monotonic()

    def cut(self, data: bytes) -> Cut:
        """Add a piece. Bytes that are not UTF-8 are escaped, and a character may span two pieces."""
        text = self._decoder.decode(data)
        if not text:
            return Cut("", "", self._drawn)
        whole, newline, rest = text.rpartition("\n")
        verbatim = lines = ""
        if newline:
            begun = "".join(self._rest)
            verbatim = (whole if self._is_redrawn else begun + whole) + newline
            lines = self._ended(begun + whole)
            self._begin_line()
        if rest:
            verbatim += self._extend(rest)
        if self._size > _LONGEST:
            line = "".join(self._rest)
            verbatim += "" if self._is_redrawn else line
            lines += _drawn_last(line) + "\n"
            self._begin_line()
        return Cut(verbatim, lines or self._taken_now(), self._drawn)

    @property
    def is_in_line(self) -> bool:
        """True if the last line has not ended."""
        return bool(self._rest)

    @property
    def _drawn(self) -> str:
        return _drawn_last("".join(self._rest)) if self._is_redrawn else ""

    def _begin_line(self) -> None:
        self._rest, self._size, self._is_redrawn = [], 0, False

    def _extend(self, rest: str) -> str:
        """Add to the unfinished line. Returns the part that is passed on verbatim now."""
        self._rest.append(rest)
        self._size += len(rest)
        if not self._is_redrawn and "\r" not in rest:
            return ""
        line = "".join(self._rest)
        verbatim = rest if self._is_redrawn else line
        # Only the last redraw is kept, with the carriage return before it.
        ended = line.rstrip("\r")
        line = ended[max(0, ended.rfind("\r")) :] + ("\r" if len(ended) < len(line) else "")
        self._rest, self._size, self._is_redrawn = [line], len(line), True
        return verbatim

    def _ended(self, text: str) -> str:
        """Return text that a newline ended as lines, without a line that was passed on and not redrawn since."""
        if "\r" in text:
            text = "\n".join(map(_drawn_last, text.split("\n")))
        lines = f"{text}\n"
        self._taken_at = time.monotonic()
        if self._taken is not None:
            lines = lines.removeprefix(f"{self._taken}\n")
            self._taken = None
        return lines

    def _taken_now(self) -> str:
        """Return the redrawn line, as a line, if it is due to be passed on; else ""."""
        if time.monotonic() < self._taken_at + _REDRAWN_S:
            return ""
        self._taken_at = time.monotonic()
        drawn = self._drawn
        if not drawn or drawn == self._taken:
            return ""
        self._taken = drawn
        return f"{drawn}\n"


def _drawn_last(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]
