"""A cgroup that freezes all of its processes at once, as a suspended machine does."""

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.processes import wait_until

_V1, _V2 = Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup")


class Freezer:
    """A folder of cgroup v1's freezer, or of cgroup v2."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / f"torchrunx_ray_{uuid.uuid4().hex[:8]}"
        self._is_v2 = root == _V2
        self._path.mkdir()

    def take(self, pids: Iterable[int]) -> None:
        _move(pids, self._path)

    def freeze(self) -> None:
        self._write("1" if self._is_v2 else "FROZEN")
        assert wait_until(self._is_frozen)

    def thaw(self) -> None:
        self._write("0" if self._is_v2 else "THAWED")

    def close(self) -> None:
        self.thaw()
        _move(map(int, (self._path / "cgroup.procs").read_text().split()), self._root)
        assert wait_until(self._is_removed)

    def _write(self, state: str) -> None:
        (self._path / ("cgroup.freeze" if self._is_v2 else "freezer.state")).write_text(state)

    def _is_frozen(self) -> bool:
        if self._is_v2:
            return "frozen 1" in (self._path / "cgroup.events").read_text()
        return (self._path / "freezer.state").read_text().strip() == "FROZEN"

    def _is_removed(self) -> bool:
        with contextlib.suppress(OSError):
            self._path.rmdir()
        return not self._path.exists()


def root() -> Path | None:
    """Where such a folder can be made; None if the machine allows none."""
    if os.geteuid() != 0:
        return None
    for path, sign in ((_V1, "cgroup.procs"), (_V2, "cgroup.controllers")):
        if (path / sign).exists() and os.access(path, os.W_OK):
            return path
    return None


@contextlib.contextmanager
def freezer() -> Iterator[Freezer]:
    path = root()
    assert path is not None
    made = Freezer(path)
    try:
        yield made
    finally:
        made.close()


def _move(pids: Iterable[int], group: Path) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))
