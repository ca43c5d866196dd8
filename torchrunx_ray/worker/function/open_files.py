"""Files that the function left open: at the worker's end they get what an interpreter's end would write."""

import gc
import io
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

_FINISH_S = 5.0

_BUFFERED = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)

_END_AT_CLOSE = (
    ("zipfile", "_ZipWriteFile"),
    ("zipfile", "ZipFile"),
    ("gzip", "GzipFile"),
    ("bz2", "BZ2File"),
    ("lzma", "LZMAFile"),
)
"""Files that write their end when they are closed. An archive's member is closed before the archive."""

_kind_of: Callable[[object], Any] = type

_of_template: "weakref.WeakSet[Any]" = weakref.WeakSet()


class _Sentinel:
    """Tracked by gc, and so no longer found when the function has called gc.freeze()."""


_sentinel: _Sentinel | None = None


def note_template() -> None:
    """Note which files no worker may finish. Called in the template, before it freezes its objects."""
    _of_template.update(_tracked())


def watch() -> None:
    """Make the sentinel. Called in a worker, before the function runs."""
    global _sentinel
    _sentinel = _Sentinel()


def finish() -> None:
    """Flush and close what the function left open.

    In a thread with a timeout: another thread may hold a file's lock for ever, and nobody may read a pipe.
    """
    finishing = threading.Thread(target=_finish_all, daemon=True)
    try:
        finishing.start()
    except RuntimeError:  # a limit of the host
        _finish_all()
    else:
        finishing.join(_FINISH_S)


def _finish_all() -> None:
    found = _tracked()
    if _sentinel not in found:
        gc.disable()
        gc.unfreeze()
        found = _tracked()
    files = [each for each in found if each not in _of_template]
    text = [each for each in files if type(each) is io.TextIOWrapper]
    binary = [each for each in files if type(each) in _BUFFERED[1:]]
    _call("flush", text)  # text lies above the bytes
    _call("flush", binary)
    for kind in _kinds_that_end_at_close():
        _call("close", [each for each in files if type(each) is kind])
    _call("flush", binary)  # a compressed file may lie in another file


def _tracked() -> list[Any]:
    """Return the files that gc knows, and the sentinel."""
    # By their ids: a metaclass of the function's may forbid to hash or compare its classes.
    kinds: tuple[type, ...] = (_Sentinel, *_BUFFERED, *_kinds_that_end_at_close())
    ids = {id(kind) for kind in kinds}
    return [each for each in gc.get_objects() if id(_kind_of(each)) in ids]


def _kinds_that_end_at_close() -> tuple[type, ...]:
    modules = ((sys.modules.get(module), name) for module, name in _END_AT_CLOSE)
    return tuple(getattr(module, name) for module, name in modules if hasattr(module, name))


def _call(method: str, files: list[Any]) -> None:
    for file in files:
        try:
            getattr(file, method)()
        except Exception:  # closed, detached, not writable, or its disk is full
            pass
