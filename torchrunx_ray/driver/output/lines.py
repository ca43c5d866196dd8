"""Splitting of a stream's text into whole lines."""

import codecs
import time

_LONGEST = 16 * 2**20
"""Limit of a line's length. A longer line is passed on in pieces, to bound the driver's memory."""

_REDRAWN_S = 5.0
"""Interval at which a line that is redrawn, such as a progress bar, is passed on as a line."""


class LineCutter:
    """Splits one stream of one worker into lines. A redrawn line counts as it was drawn last."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest = ""
        self._taken: str | None = None
        """The text of the unfinished, redrawn line that was last passed on as a line."""
        self._taken_at = time.monotonic()

    @property
    def drawn(self) -> str:
        """The current text of a redrawn line that has not ended, else ""."""
        return _drawn_last(self._rest) if "\r" in self._rest else ""

    def decode(self, data: bytes) -> str:
        """Return a piece as text. Bytes that are not UTF-8 are escaped. A character may span two pieces."""
        return self._decoder.decode(data)

    def cut(self, text: str) -> str:
        """Add text, and return the lines that are complete now.

        At intervals the result includes a redrawn line that has not ended.
        """
        whole, newline, rest = (self._rest + text).rpartition("\n")
        if "\r" in whole:
            whole = "\n".join(map(_drawn_last, whole.split("\n")))
        lines = whole + newline
        if newline and self._taken is not None:
            lines = lines.removeprefix(self._taken + "\n")  # passed on, and not redrawn since
            self._taken = None
        # Keep only the last redraw of the rest, with the carriage return before it.
        ended = rest.rstrip("\r")
        self._rest = ended[max(0, ended.rfind("\r")) :] + ("\r" if len(ended) < len(rest) else "")
        return lines + self._taken_now(bool(lines))

    def _taken_now(self, has_lines: bool) -> str:
        """Return the unfinished line, as a line, if it is too long or due to be passed on; else ""."""
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
