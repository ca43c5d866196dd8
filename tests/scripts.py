"""Scripts of users, and what a type checker says of them."""

import os
import subprocess
import sys
from pathlib import Path


def run_alone(script: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script that does nothing about Ray: its launch joins one, or starts one.

    What else the script did would be done by its children.
    """
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={"RAY_ADDRESS": "local", **os.environ},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def types_in(script: str, folder: Path) -> tuple[list[str], list[int]]:
    """What `reveal_type` reveals, in order, and the numbers of the lines that are wrong."""
    (folder / "typed.py").write_text(script)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "typed.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    said = [
        line.partition("typed.py:")[2] for line in done.stdout.splitlines() if "typed.py:" in line
    ]
    revealed = [line.partition(" is ")[2] for line in said if "information" in line]
    return revealed, [int(line.partition(":")[0]) for line in said if "error" in line]
