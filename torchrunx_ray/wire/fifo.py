"""FIFOs whose reader holds a lock, so that nobody takes over or removes the FIFO of another reader."""

import contextlib
import errno
import fcntl
import os
import stat


def open_locked(path: str) -> int:
    """Make a FIFO, or take over one that nobody reads, and return its descriptor.

    Raises BlockingIOError if somebody reads it, FileExistsError if the path leads to something else, and other
    kinds of OSError.
    """
    while True:
        was_there = False
        try:
            os.mkfifo(path, 0o600)
        except FileExistsError:
            was_there = True
        try:
            _check_unread(path)
            fd = _lock(path)
        except FileNotFoundError:
            if was_there:  # its last reader has just removed it
                continue
            raise
        if _is_at(path, fd):
            return fd
        os.close(fd)


def remove(path: str) -> None:
    """Remove a FIFO that nobody reads. Raises OSError if that is not possible."""
    _check_unread(path)
    fd = _lock(path)
    try:
        if _is_at(path, fd):
            os.unlink(path)
    finally:
        os.close(fd)


def remove_own(path: str, fd: int) -> None:
    """Remove the FIFO that this descriptor reads, unless the path leads to another one by now."""
    with contextlib.suppress(OSError):
        if _is_at(path, fd):
            os.unlink(path)


def _check_unread(path: str) -> None:
    """Raise BlockingIOError if a process reads the FIFO without a lock, as torch's own server does."""
    if not stat.S_ISFIFO(os.stat(path, follow_symlinks=False).st_mode):
        raise FileExistsError(errno.EEXIST, "it is no FIFO")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:  # nobody reads
            raise
    else:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process reads it")


def _lock(path: str) -> int:
    """Open and lock a FIFO. It is open for writing, too, or would be at its end whenever no writer has it open."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise FileExistsError(errno.EEXIST, "it is no FIFO")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
