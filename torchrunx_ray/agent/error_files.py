"""Files in which workers record why they fail, as torch's `@record` does."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from torchrunx_ray.wire.folder import remove

_MOST = 2**18
"""Bytes of a file that are sent to the driver."""


class ErrorFiles:
    """The error files of one host's workers in one attempt."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder: Path | None = None
        """None if the host has no room for the files. Workers can do without."""
        with contextlib.suppress(OSError):
            self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._attempt = f"attempt_{attempt}"

    def make_room(self, local_rank: int) -> dict[str, str]:
        """Make the folder of a worker's file. Return the variable that names the file, which nobody has written yet."""
        with contextlib.suppress(OSError):
            if (path := self._path(local_rank)) is not None:
                path.parent.mkdir(parents=True)
                return {"TORCHELASTIC_ERROR_FILE": str(path)}
        return {}

    def read(self, local_rank: int) -> str:
        """Return the start of a worker's file; empty if there is no plain file that can be read.

        A FIFO must not block the agent, and a link might lead to a device.
        """
        if (path := self._path(local_rank)) is None:
            return ""
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return os.read(fd, _MOST).decode(errors="backslashreplace")
            finally:
                os.close(fd)
        return ""

    def remove(self) -> None:
        if self._folder is not None:
            remove(str(self._folder))

    def _path(self, local_rank: int) -> Path | None:
        """Return the path, whose last parts are as under torchrun."""
        return self._folder and self._folder / self._attempt / str(local_rank) / "error.json"
