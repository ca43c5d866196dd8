"""Tracebacks that show the user's lines, and few lines of this package."""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import types
from collections.abc import Iterator

_OURS = f"{os.path.dirname(os.path.dirname(__file__))}{os.sep}"

_FACE = tuple(
    os.path.join(os.path.dirname(__file__), name)
    for name in ("run.py", "session.py", "launcher.py", "background/loop.py")
)
"""Files whose innermost frame explains nothing: they only wait, and pass on exceptions from elsewhere."""

_PLUMBING = (
    f"{os.path.dirname(asyncio.__file__)}{os.sep}",
    f"{os.path.dirname(concurrent.futures.__file__)}{os.sep}",
    threading.__file__,
    contextlib.__file__,
)


class _ShortTraceback:
    """A context manager whose exceptions show at most two frames of this package.

    The outermost is the method that the user called, the innermost the line that raised. This is a
    class, since a contextlib generator would restore the old traceback.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            shorten(error)


short_traceback = _ShortTraceback()


def shorten(error: BaseException) -> None:
    """Leave at most two frames of this package in the tracebacks of an exception and of its causes and contexts."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        _set_traceback(each, _shortened(_traceback(each)))
        chain += [each.__cause__, each.__context__]


def has_users_frame(error: BaseException) -> bool:
    """Return True if the traceback has a frame that is neither of this package nor of its plumbing."""
    return any(not _is_ours_or_plumbing(frame) for frame in _frames(_traceback(error)))


def _shortened(traceback: types.TracebackType | None) -> types.TracebackType | None:
    frames = list(_frames(traceback))
    ours = [frame for frame in frames if _file(frame).startswith(_OURS)]
    kept = ours[:1]
    if ours and not _file(ours[-1]).startswith(_FACE):
        kept += ours[-1:]
    short: types.TracebackType | None = None
    for frame in reversed(frames):
        if frame in kept or not _is_ours_or_plumbing(frame):
            short = types.TracebackType(short, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return short


def _is_ours_or_plumbing(frame: types.TracebackType) -> bool:
    return _file(frame).startswith((_OURS, *_PLUMBING))


def _file(frame: types.TracebackType) -> str:
    return frame.tb_frame.f_code.co_filename


def _frames(traceback: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


# Called through the base class: an exception may refuse attribute access.


def _traceback(error: BaseException) -> types.TracebackType | None:
    return vars(BaseException)["__traceback__"].__get__(error)


def _set_traceback(error: BaseException, traceback: types.TracebackType | None) -> None:
    vars(BaseException)["__traceback__"].__set__(error, traceback)
