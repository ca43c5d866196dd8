"""Memory of processes, and of the lane that they run in, in bytes."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

MIB = 2**20


def megabytes(count: int) -> torch.Tensor:
    return torch.ones(count * MIB, dtype=torch.uint8)


def shared_memory(*, of_ray: bool = True) -> int:
    """Files in /dev/shm, and files without a name that some process has open or mapped.

    The kernel's own count is of the whole machine, and so of other lanes too. With `of_ray` false,
    Ray's object stores are left out: they keep what they have touched.
    """
    sizes: dict[tuple[int, int], int] = {}
    for path in _shared_files(of_ray):
        with contextlib.suppress(OSError):  # gone meanwhile
            found = path.stat()
            sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def _shared_files(of_ray: bool) -> Iterator[Path]:
    def counts(name: str) -> bool:
        is_rays = name.startswith("/dev/shm/plasma")
        return name.startswith(("/memfd:", "/dev/shm/")) and (of_ray or not is_rays)

    yield from (path for path in Path("/dev/shm").iterdir() if counts(str(path)))
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if counts(os.readlink(fd)):
                        yield fd
            for line in (process / "maps").read_text().splitlines():
                place, *_, name = line.split(maxsplit=5)
                if counts(name):
                    yield process / "map_files" / _as_in_map_files(place)


def _as_in_map_files(place: str) -> str:
    """Its two addresses without leading zeros."""
    return "-".join(f"{int(address, 16):x}" for address in place.split("-"))


def status(pid: int, key: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def proportional_anon(pid: int) -> int:
    """Memory of a process that is no file's, shared pages divided by those who share them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return kib * 1024
