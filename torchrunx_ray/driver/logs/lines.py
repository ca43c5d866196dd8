"""What a stream says, as text in whole lines."""

import codecs
import time

_REDRAWN_S = 5.0
"""How often a line that is drawn anew and anew, such as a progress bar, is taken as a line."""


class LineCutter:
    """Of one stream of one worker. A line that was drawn anew counts as it was drawn last."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest = ""
        self._taken_at = time.monotonic()

    @property
    def drawn(self) -> str:
        """The line that is being drawn."""
        return _drawn_last(self._rest) if "\r" in self._rest else ""

    def decode(self, data: bytes) -> str:
        """What is not UTF-8 is escaped; a character may come in two pieces."""
        return self._decoder.decode(data)

    def cut(self, text: str) -> str:
        """The lines that are whole with this text; now and then with one that is still drawn."""
        whole, newline, rest = (self._rest + text).rpartition("\n")
        if "\r" in whole:
            whole = "\n".join(map(_drawn_last, whole.split("\n")))
        self._rest = rest[max(0, rest.rstrip("\r").rfind("\r")) :]
        lines = whole + newline
        if self.drawn and time.monotonic() >= self._taken_at + _REDRAWN_S:
            lines += self.drawn + "\n"
        if lines:
            self._taken_at = time.monotonic()
        return lines


def _drawn_last(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]
