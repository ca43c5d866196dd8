"""Files in which workers record why they fail, as torch's `@record` does."""

import contextlib
import os
import stat
from pathlib import Path

from torchrunx_ray.wire.folder import remove

_MOST = 65536
"""Bytes of a file that are sent to the driver."""


class ErrorFiles:
    """The error files of one host's workers in one attempt, at torch's place for them."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder = folder / f"attempt_{attempt}"

    def make_room(self, local_rank: int) -> dict[str, str]:
        """Make the folder of a worker's file. Return the variable that names the file, which nobody has written yet."""
        path = self._path(local_rank)
        try:
            path.parent.mkdir(parents=True)
        except OSError:  # such as a full disk; the worker can do without
            return {}
        return {"TORCHELASTIC_ERROR_FILE": str(path)}

    def read(self, local_rank: int) -> str:
        """Return the start of a worker's file; empty if there is no plain file that can be read.

        A FIFO must not block the agent, and a link might lead to a device.
        """
        with contextlib.suppress(OSError):
            fd = os.open(self._path(local_rank), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return os.read(fd, _MOST).decode(errors="backslashreplace")
            finally:
                os.close(fd)
        return ""

    def remove(self) -> None:
        remove(str(self._folder))

    def _path(self, local_rank: int) -> Path:
        return self._folder / str(local_rank) / "error.json"
