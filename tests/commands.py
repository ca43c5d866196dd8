"""The command `torchrunx-ray`, and torchrun beside it, as users type them."""

import os
import subprocess
import sys
from pathlib import Path

OURS = [sys.executable, "-m", "torchrunx_ray"]
TORCHRUNS = [sys.executable, "-m", "torch.distributed.run"]


def begin(
    command: list[str], folder: Path, *words: str, **variables: str
) -> "subprocess.Popen[str]":
    """Start a command in a folder. Its output comes line by line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    return subprocess.Popen(
        [*command, *words],
        cwd=folder,
        env={name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(running: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    """Wait for the end of a command."""
    stdout, stderr = running.communicate(timeout=100)
    return subprocess.CompletedProcess(running.args, running.returncode, stdout, stderr)


def run(folder: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `torchrunx-ray` in a folder."""
    return ended(begin(OURS, folder, *words, **variables))
