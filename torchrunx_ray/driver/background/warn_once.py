"""Warnings that are given once."""

import contextlib
import logging
import traceback

logger = logging.getLogger("torchrunx_ray")


class WarnOnce:
    """A warning that is logged once, however often its error occurs. It never raises.

    The last %s of `words` is for the error. With `tells_line` the error is followed by the line that raised it.
    """

    def __init__(self, words: str, *args: object, tells_line: bool = True) -> None:
        self._words, self._args = words, args
        self._tells_line = tells_line
        self._was_told = False

    def tell(self, error: BaseException | None) -> None:
        if self._was_told:
            return
        self._was_told = True
        with contextlib.suppress(BaseException):  # a logging handler may fail on this, too
            what = _with_line(error) if self._tells_line else error
            logger.warning(self._words, *self._args, what)


def _with_line(error: BaseException | None) -> str:
    said = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(None if error is None else error.__traceback__)
    if not frames:
        return said
    return f"{said} ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})"
