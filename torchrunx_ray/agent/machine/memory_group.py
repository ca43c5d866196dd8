"""The memory cgroup of a process, and the count of processes that the kernel killed there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**60
"""Limits from this size on mean none: cgroup v1 writes "no limit" as a number close to the largest."""


@dataclass(frozen=True)
class MemoryGroup:
    """A folder of cgroup v1's memory controller, or of cgroup v2."""

    path: Path

    @property
    def oom_kills(self) -> int | None:
        """Number of the group's processes that the out-of-memory killer has killed; None if unknown."""
        for name in ("memory.events", "memory.oom_control"):
            for line in self._read(name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        return None

    @property
    def limit(self) -> int | None:
        """Limit in bytes; None if there is none."""
        text = self._read("memory.max") or self._read("memory.limit_in_bytes")
        limit = int(text) if text.strip().isdigit() else _NO_LIMIT
        return limit if limit < _NO_LIMIT else None

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except OSError:
            return ""


def of_process(pid: int, proc: Path = Path("/proc")) -> MemoryGroup | None:
    """Return the memory cgroup of a process; None if the host does not show it."""
    try:
        membership = (proc / str(pid) / "cgroup").read_text()
        mounts = (proc / str(pid) / "mountinfo").read_text()
    except OSError:
        return None
    paths = [line.split(":", 2)[1:] for line in membership.splitlines()]
    for controllers, path in sorted(paths, reverse=True):  # v2 last: it names no controllers
        is_v2 = controllers == ""
        if not (is_v2 or "memory" in controllers.split(",")):
            continue
        for root, mount_point in _mounts(mounts, is_v2):
            # In a container the mount shows a part of the tree, and the path may begin above that part.
            inside = path.removeprefix(root) if root != "/" else path
            for folder in (Path(mount_point, inside.lstrip("/")), Path(mount_point)):
                group = MemoryGroup(folder)
                if group.oom_kills is not None:
                    return group
    return None


def _mounts(mountinfo: str, is_v2: bool) -> Iterator[tuple[str, str]]:
    """Yield the root and the mount point of each mount of the memory controller, or of cgroup v2."""
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        root, mount_point = mount.split()[3:5]
        fields = kind.split()
        is_memory = fields[0] == "cgroup" and "memory" in fields[-1].split(",")
        if (fields[0] == "cgroup2") if is_v2 else is_memory:
            yield root, mount_point
