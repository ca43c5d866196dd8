"""Files that the function left open: finished when the worker exits, as an interpreter's exit would do."""

import contextlib
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
"""Classes of files that write their end when closed, in closing order: an archive's member before the archive."""

_kind_of: Callable[[object], Any] = type

_of_template: "weakref.WeakSet[Any]" = weakref.WeakSet()


class _Sentinel:
    """An object that gc tracks. If gc no longer lists it, the function has called gc.freeze()."""


_sentinel: _Sentinel | None = None


def note_template() -> None:
    """Note the template's files, which no worker may finish. Called in the template before gc.freeze()."""
    _of_template.update(_tracked())


def watch() -> None:
    """Create the sentinel. Called in a worker before the function runs."""
    global _sentinel
    _sentinel = _Sentinel()


def finish() -> None:
    """Flush and close the files that the function left open.

    This runs in a thread, with a timeout: another thread may hold a file's lock forever, or a pipe may have no
    reader.
    """
    finishing = threading.Thread(target=_finish_all, daemon=True)
    try:
        finishing.start()
    except RuntimeError:  # the host allows no more threads
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
    _call("flush", text)  # first, because text files write into binary files
    _call("flush", binary)
    for kind in _kinds_that_end_at_close():
        _call("close", [each for each in files if type(each) is kind])
    _call("flush", binary)  # again, because a compressed file may write into another file


def _tracked() -> list[Any]:
    """Return the open files and the sentinel, as far as gc lists them."""
    # Classes are compared by id: a metaclass of the user may forbid hashing or comparing its classes.
    kinds: tuple[type, ...] = (_Sentinel, *_BUFFERED, *_kinds_that_end_at_close())
    ids = {id(kind) for kind in kinds}
    return [each for each in gc.get_objects() if id(_kind_of(each)) in ids]


def _kinds_that_end_at_close() -> tuple[type, ...]:
    modules = ((sys.modules.get(module), name) for module, name in _END_AT_CLOSE)
    return tuple(getattr(module, name) for module, name in modules if hasattr(module, name))


def _call(method: str, files: list[Any]) -> None:
    for file in files:
        with contextlib.suppress(Exception):  # closed, detached, not writable, or its disk is full
            getattr(file, method)()
