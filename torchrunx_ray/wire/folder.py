"""A template's temporary folder, for files that workers find by their path.

The keepers remove the folder when they end. If they and the agent are killed together, the next agent removes it.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

_PREFIX = "torchrunx_ray_"

_OUTSIDE = "outside"
"""Link to a file at a place that the user chose."""


class Folder:
    """A folder that is in use while some process holds `fd`, which carries a shared lock."""

    def __init__(self, mark: str) -> None:
        self.path = Path(tempfile.gettempdir(), f"{_PREFIX}{mark}")
        unlocked = self.path.with_name(f".{self.path.name}")  # a name that `sweep` does not see
        unlocked.mkdir(mode=0o700)
        self.fd = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self.fd, fcntl.LOCK_SH)
        unlocked.rename(self.path)

    def close(self) -> None:
        os.close(self.fd)


def sweep() -> None:
    """Remove folders that no process uses any more."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, in use, or removed meanwhile
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(str(path))
            finally:
                os.close(fd)


@contextlib.contextmanager
def name_outside(folder: Path, path: Path) -> Generator[None]:
    """Let a file elsewhere be removed with the folder, while this context lasts."""
    link = folder / _OUTSIDE
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    yield
    link.unlink(missing_ok=True)


def remove(path: str) -> None:
    """Remove a folder, and the file that `name_outside` has named."""
    import shutil  # takes 4 ms, and a keeper needs it only at its end

    with contextlib.suppress(OSError):  # nothing is outside
        os.unlink(os.readlink(os.path.join(path, _OUTSIDE)))
    shutil.rmtree(path, ignore_errors=True)
