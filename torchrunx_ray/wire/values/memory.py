"""Copies between the memory of two processes on one host, and within a process.

A process may open its own memory in /proc, and any process that gets the descriptor may read and write there. No
permission to trace is needed. No file is used in between: a file gets small pages, one at a time, while fresh
memory can have huge pages and be filled by several threads.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

_HUGE = 4 * 2**20
"""Size from which fresh memory gets huge pages."""

_BATCH = 16 * 2**20
"""Bytes that a thread moves at a time."""

_MOST_IN_BATCH = 1024
"""Pieces of memory that one system call accepts."""

_THREADS = min(4, os.cpu_count() or 1)
"""Threads that copy. One thread does not use the full memory bandwidth; too many would slow down the workers."""


Move = tuple[int, int, int]
"""An address in this process, an address or file position elsewhere, and the number of bytes to move."""


@dataclass(frozen=True)
class Remote:
    """The memory of another process, by its pid and by the descriptor that it sent.

    Access by pid takes half the time, but needs a permission to trace that not every host gives. Access by
    descriptor needs none. Both methods return False if the process has ended or `is_wanted` returns False. They
    raise OSError if the memory cannot be accessed from outside.
    """

    pid: int
    fd: int
    is_wanted: Callable[[], bool]

    def read(self, moves: Iterable[Move]) -> bool:
        """Copy from the other process to this one."""
        return _in_batches(partial(self._move, _libc.process_vm_readv, os.preadv), moves)

    def write(self, moves: Iterable[Move]) -> bool:
        """Copy from this process to the other one."""
        return _in_batches(partial(self._move, _libc.process_vm_writev, os.pwritev), moves)

    def _move(self, by_pid: Any, by_fd: "_ByDescriptor", batch: Sequence[Move]) -> bool:
        # The descriptor shows that the process is alive. Otherwise its pid may belong to a new process.
        if not (self.is_wanted() and os.pread(self.fd, 1, batch[0][1])):
            return False
        ours = _io_vectors((here, size) for here, _there, size in batch)
        theirs = _io_vectors((there, size) for _here, there, size in batch)
        count, total = len(batch), sum(size for _here, _there, size in batch)
        if by_pid(self.pid, ours, count, theirs, count, 0) == total:
            return True
        return all(_move_all(by_fd, self.fd, *move) for move in batch)


def open_own() -> int:
    """Return a descriptor with which any process can read and write this process's memory by address.

    The descriptor gives access to the current mappings, and to nothing after this process has ended. Raise OSError
    if there is no /proc, or if this process may not be inspected (see prctl's PR_SET_DUMPABLE).
    """
    return os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)


def write_file(fd: int, moves: Iterable[Move]) -> None:
    """Copy from this process to positions in a file."""
    for move in moves:
        _move_all(os.pwritev, fd, *move)


def copy(source: memoryview, address: int) -> None:
    """Copy a buffer to an address in this process."""

    def move(batch: Sequence[Move]) -> bool:
        for here, there, size in batch:
            ctypes.memmove(there, here, size)  # releases the GIL
        return True

    _in_batches(move, [(address_of(source), address, source.nbytes)])


def allocate(size: int) -> mmap.mmap:
    """Return fresh memory, private to this process and its forks."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    expect_copy(address_of(memory), size)
    return memory


def expect_copy(address: int, size: int) -> None:
    """Ask for huge pages before a large copy, which makes fresh memory 5 times faster.

    The request is only advice, which the kernel may ignore.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # not every system has it
    if advice is not None and size >= _HUGE:
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def address_of(buffer: object) -> int:
    """Return a buffer's address, also for a read-only buffer, which `ctypes.addressof` refuses."""
    held = _Buffer()
    _get_buffer(buffer, ctypes.byref(held), 0)
    try:
        return held.address or 0
    finally:
        _release_buffer(ctypes.byref(held))


def view(address: int, size: int) -> memoryview:
    """Return a writable view of this process's memory, which the caller must keep alive."""
    return _view_of_memory(address, size, _PyBUF_WRITE)


_ByDescriptor = Callable[[int, Sequence[memoryview], int], int]


def _move_all(by_fd: _ByDescriptor, fd: int, here: int, there: int, size: int) -> bool:
    while size:
        moved = by_fd(fd, [view(here, size)], there)
        if moved == 0:
            return False
        here, there, size = here + moved, there + moved, size - moved
    return True


def _in_batches(move: Callable[[Sequence[Move]], bool], moves: Iterable[Move]) -> bool:
    batches = list(_batches(moves))
    if len(batches) > 1:
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                return all(pool.map(move, batches))
        except RuntimeError:
            pass  # no thread can be started: a limit of the host, or the interpreter is exiting
    return all(map(move, batches))


def _batches(moves: Iterable[Move]) -> Iterator[list[Move]]:
    batch: list[Move] = []
    room = _BATCH
    for here, there, size in moves:
        done = 0
        while done < size:
            piece = min(size - done, room)
            batch.append((here + done, there + done, piece))
            done, room = done + piece, room - piece
            if room == 0 or len(batch) == _MOST_IN_BATCH:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


def _io_vectors(pieces: Iterable[tuple[int, int]]) -> Any:
    """Return the C library's iovecs: the address and the size of each piece."""
    flat = [number for piece in pieces for number in piece]
    return (ctypes.c_size_t * len(flat))(*flat)


class _Buffer(ctypes.Structure):
    """CPython's Py_buffer, of which only the first field is read. The structure may be larger than CPython's."""

    _fields_ = (("address", ctypes.c_void_p), ("others", ctypes.c_void_p * 10))


_libc: Any = ctypes.CDLL(None)
_get_buffer: Any = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
_release_buffer: Any = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.c_void_p,)
_PyBUF_WRITE = 0x200
_view_of_memory: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.restype = ctypes.py_object
_view_of_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
