"""A template's temporary folder, for files that workers find by their path.

The keepers remove the folder when they end, and the agent when the template has gone. If agent and keepers are killed
together, the next agent on the node removes the folder.
"""

import contextlib
import fcntl
import os
import re
import stat
import time
from pathlib import Path

from torchrunx_ray.wire import fifo

_NAME = "torchrunx_ray_{}"
_NAMES = re.compile(r"\.?torchrunx_ray_[0-9a-f]{32}")

_OUTSIDE = "outside"
"""Link to a FIFO at a place that the user chose."""

_MADE_S = 60.0
"""Age at which a folder that still has its first name was left by an agent that was killed."""


def path_of(mark: str) -> Path:
    return Path(_parent(), _NAME.format(mark))


class Folder:
    """A folder that is in use while some process holds `fd`, which carries a shared lock. Raises OSError."""

    def __init__(self, path: Path) -> None:
        unlocked = path.with_name(f".{path.name}")
        unlocked.mkdir(mode=0o700)
        self.fd = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH)
            unlocked.rename(path)
        except OSError:
            os.close(self.fd)
            unlocked.rmdir()
            raise

    def close(self) -> None:
        os.close(self.fd)


def note_outside(folder: Path, path: Path) -> None:
    """Let a FIFO elsewhere be removed with the folder, if nobody uses it then."""
    link = folder / _OUTSIDE
    link.unlink(missing_ok=True)
    link.symlink_to(path)


def forget_outside(folder: Path) -> None:
    (folder / _OUTSIDE).unlink(missing_ok=True)


def sweep() -> None:
    """Remove this user's folders that no process uses any more."""
    parent = _parent()
    for name in filter(_NAMES.fullmatch, os.listdir(parent)):
        path = os.path.join(parent, name)
        with contextlib.suppress(OSError):  # in use, somebody else's, or removed meanwhile
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _may_be_left(name, os.fstat(fd)):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(path)
            finally:
                os.close(fd)


def remove(path: str) -> None:
    """Remove a folder, and the FIFO that `note_outside` has noted."""
    import shutil  # takes 4 ms, which the start of a keeper can do without

    with contextlib.suppress(OSError):  # nothing is outside
        fifo.remove(os.readlink(os.path.join(path, _OUTSIDE)))
    shutil.rmtree(path, ignore_errors=True)


def _may_be_left(name: str, status: os.stat_result) -> bool:
    is_ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
    return is_ours and (not name.startswith(".") or time.time() - status.st_mtime > _MADE_S)


def _parent() -> str:
    import tempfile  # imports shutil

    return tempfile.gettempdir()
