"""Text of a stream, cut into whole lines."""

import codecs
import time

_LONGEST = 16 * 2**20
"""A longer line is passed on in pieces: the driver's memory is bounded."""

_REDRAWN_S = 5.0
"""Interval at which a line that is drawn again and again, such as a progress bar, is taken as a line."""


class LineCutter:
    """Cuts one stream of one worker into lines. A line that was drawn again counts as it was drawn last."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest = ""
        self._taken: str | None = None
        """The line that is being drawn, as it was taken for a line last."""
        self._taken_at = time.monotonic()

    @property
    def drawn(self) -> str:
        """The line that is being drawn."""
        return _drawn_last(self._rest) if "\r" in self._rest else ""

    def decode(self, data: bytes) -> str:
        """Return a piece as text. Bytes that are not UTF-8 are escaped; a character may come in two pieces."""
        return self._decoder.decode(data)

    def cut(self, text: str) -> str:
        """The lines that are whole with this text; now and then with one that is still drawn."""
        whole, newline, rest = (self._rest + text).rpartition("\n")
        if "\r" in whole:
            whole = "\n".join(map(_drawn_last, whole.split("\n")))
        lines = whole + newline
        if newline and self._taken is not None:
            lines = lines.removeprefix(self._taken + "\n")  # nothing was drawn after it
            self._taken = None
        # Of the rest, what was drawn last, with the carriage return before it.
        ended = rest.rstrip("\r")
        self._rest = ended[max(0, ended.rfind("\r")) :] + ("\r" if len(ended) < len(rest) else "")
        return lines + self._taken_now(bool(lines))

    def _taken_now(self, has_lines: bool) -> str:
        """Return the part that is taken of the line that has not ended."""
        if len(self._rest) > _LONGEST:
            taken, self._rest = _drawn_last(self._rest), ""
            return taken + "\n"
        is_time = time.monotonic() >= self._taken_at + _REDRAWN_S
        if has_lines or is_time:
            self._taken_at = time.monotonic()
        if is_time and self.drawn and self.drawn != self._taken:
            self._taken = self.drawn
            return self.drawn + "\n"
        return ""


def _drawn_last(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]
