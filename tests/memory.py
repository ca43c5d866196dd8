"""What processes and the machine have of it, in bytes."""

import re
from pathlib import Path

import torch

MIB = 2**20


def megabytes(count: int) -> torch.Tensor:
    return torch.ones(count * MIB, dtype=torch.uint8)


def meminfo(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


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
