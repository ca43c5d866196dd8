"""Bytes from one process's memory to another's on the same host, and within one.

A process may always open its own memory in /proc, and whoever is handed that descriptor may read
and write there: no right to trace is needed. Between them goes no file: the pages of one come small
and one at a time, where fresh memory has huge pages and takes several threads.
"""

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

_HUGE = 4 * 2**20
"""From here on fresh memory is given huge pages."""

_CHUNK = 16 * 2**20
"""Copied at a time by a thread."""

_THREADS = min(4, os.cpu_count() or 1)
"""One does not fill the memory's bandwidth; the workers compute beside them."""


@dataclass(frozen=True)
class Span:
    """A piece of some process's memory."""

    address: int
    size: int


@dataclass(frozen=True)
class Remote:
    """The memory of another process, by its pid and by the descriptor that it handed out.

    The short way, by pid, takes half the time and a right to trace that not every host gives; the
    descriptor always does. Both methods return False where the process has ended.
    """

    pid: int
    fd: int

    def read(self, parts: "Iterable[tuple[memoryview, int]]") -> bool:
        """Fill each view from an address there."""
        return _in_chunks(self._read, parts)

    def write(self, parts: "Iterable[tuple[memoryview, int]]") -> bool:
        """Copy each view to an address there."""
        return _in_chunks(self._write, parts)

    def _read(self, view: memoryview, address: int) -> int:
        moved = self._by_pid(_libc.process_vm_readv, view, address)
        return os.preadv(self.fd, [view], address) if moved is None else moved

    def _write(self, view: memoryview, address: int) -> int:
        moved = self._by_pid(_libc.process_vm_writev, view, address)
        return os.pwrite(self.fd, view, address) if moved is None else moved

    def _by_pid(self, call: Any, view: memoryview, address: int) -> int | None:
        """None where that way is closed."""
        if not os.pread(self.fd, 1, address):
            return 0  # it has ended, and its pid may be another's
        ours = _IoVector(address_of(view), view.nbytes)
        theirs = _IoVector(address, view.nbytes)
        moved: int = call(self.pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        return moved if moved > 0 else None


def open_own() -> int:
    """A descriptor with which any process can read and write this one's memory by address.

    It shows what is mapped at the time, and nothing once this process has ended.
    """
    return os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)


def allocate(size: int) -> mmap.mmap:
    """Fresh memory, private to this process and what it forks."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    expect_copy(address_of(memory), size)
    return memory


def expect_copy(address: int, size: int) -> None:
    """Ask for huge pages where much is to be copied: fresh memory comes 5 times faster so.

    It is advice: whether it is taken does not matter.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # not every system has it
    if advice is not None and size >= _HUGE:
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def write_file(fd: int, parts: "Iterable[tuple[memoryview, int]]") -> None:
    """Copy each view to a position in a file."""
    _in_chunks(lambda view, position: os.pwrite(fd, view, position), parts)


def copy(view: memoryview, address: int) -> None:
    """To an address of this process."""
    if view.nbytes <= _CHUNK:
        _move(view, address)
    else:
        _in_chunks(_move, [(view, address)])


def is_readable(own_memory: int, view: memoryview) -> bool:
    """Whether `read` will do: page-locked memory of a GPU's driver cannot be read from outside."""
    try:
        return view.nbytes == 0 or len(os.pread(own_memory, 1, address_of(view))) == 1
    except OSError:
        return False


def address_of(buffer: object) -> int:
    """Also of a read-only one, which ctypes' own `addressof` refuses."""
    held = _Buffer()
    _get_buffer(buffer, ctypes.byref(held), 0)
    try:
        return held.address or 0
    finally:
        _release_buffer(ctypes.byref(held))


def _move(view: memoryview, address: int) -> int:
    ctypes.memmove(address, address_of(view), view.nbytes)  # without the GIL
    return view.nbytes


def _in_chunks(
    move: Callable[[memoryview, int], int], parts: "Iterable[tuple[memoryview, int]]"
) -> bool:
    """False where `move` had nowhere to move from or to."""
    chunks = list(_chunks(parts))
    if sum(view.nbytes for view, _address in chunks) <= _CHUNK:
        return all(_move_all(move, *chunk) for chunk in chunks)
    with ThreadPoolExecutor(_THREADS) as pool:
        return all(pool.map(functools.partial(_move_all, move), *zip(*chunks, strict=True)))


def _chunks(parts: "Iterable[tuple[memoryview, int]]") -> "Iterator[tuple[memoryview, int]]":
    for view, address in parts:
        for begin in range(0, view.nbytes, _CHUNK):
            yield view[begin : begin + _CHUNK], address + begin


def _move_all(move: Callable[[memoryview, int], int], view: memoryview, address: int) -> bool:
    while view.nbytes:
        moved = move(view, address)
        if moved == 0:
            return False
        view, address = view[moved:], address + moved
    return True


class _IoVector(ctypes.Structure):
    """The C library's iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Buffer(ctypes.Structure):
    """CPython's Py_buffer."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.py_object),
        ("size", ctypes.c_ssize_t),
        ("item_size", ctypes.c_ssize_t),
        ("is_readonly", ctypes.c_int),
        ("dimensions", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("sub_offsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_libc: Any = ctypes.CDLL(None)
_get_buffer: Any = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
_release_buffer: Any = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.c_void_p,)
