"""Interpreters that lack something."""

import subprocess
import sys
from pathlib import Path

import ray

import torchrunx_ray as trx


def python_without(package: str, folder: Path) -> Path:
    """One with all that this one has, but for a package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    here = Path(ray.__file__).parents[1]
    there = folder / "lib" / here.parent.name / "site-packages"
    for entry in here.iterdir():
        if entry.name.partition("-")[0] != package and "torchrunx_ray" not in entry.name:
            (there / entry.name).symlink_to(entry)
    if package != "torchrunx_ray":
        (there / "torchrunx_ray").symlink_to(Path(trx.__file__).parent)
    return folder / "bin" / "python"


def python_of_an_older_system(folder: Path) -> Path:
    """One that was built where the kernel's younger calls were not known, as conda's is."""
    python = python_without("", folder)
    (packages,) = folder.glob("lib/*/site-packages")
    gone = "vars(os).pop('pidfd_open', None); vars(os).pop('memfd_create', None)"
    (packages / "older.pth").write_text(f"import os; {gone}\n")
    return python
