"""Reads from a host's Python environment when workers start.

On a network file system, the first launch on many hosts waits for these reads. Data are transferred once per host, if
the page cache holds them, but each open and each lookup of a file asks the server again. A template does this once per
host. A launcher that starts an interpreter per worker does it once per worker.

    python benchmarks/reads.py [--workers 8]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ray

import torchrunx_ray as trx

IMPORT = [sys.executable, "-c", "import torch, torch.distributed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", help="where to write the numbers, too")
    arguments = parser.parse_args()
    os.environ["TORCHRUNX_LOG_DIR"] = ""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    launcher = trx.Launcher(
        workers_per_host=arguments.workers, cpus_per_worker=1 / arguments.workers, backend=None
    )
    workers = list(launcher.run(lambda: reads("self")))
    template = launcher.run(lambda: reads(os.getppid())).rank(0)
    ray.shutdown()
    rows = {
        "an interpreter that imports torch": reads_of_interpreter(),
        "the template": template,
        "each worker": {k: max(seen[k] for seen in workers) for k in template},
    }
    print(f"{'':36}{'read() calls':>14}{'MB':>8}")
    for name, seen in rows.items():
        print(f"{name:36}{seen['calls']:14}{seen['bytes'] / 1e6:8.1f}")
    if shutil.which("strace"):
        rows["calls of the interpreter that name a file"] = named = named_files()
        print(f"calls of the interpreter that name a file: {named}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


def reads(pid: int | str) -> dict[str, int]:
    """Return a process's reads since its fork. For a worker, these are the reads of joining and of its function."""
    return parsed(Path(f"/proc/{pid}/io").read_text())


def parsed(text: str) -> dict[str, int]:
    counts = dict(line.split(": ") for line in text.strip().splitlines())
    return {"calls": int(counts["syscr"]), "bytes": int(counts["rchar"])}


def reads_of_interpreter() -> dict[str, int]:
    show = "; from pathlib import Path; print(Path('/proc/self/io').read_text())"
    command = [*IMPORT[:2], IMPORT[2] + show]
    return parsed(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def named_files() -> dict[str, int]:
    """Return the number of calls that name a file, of those that open it, and of those that find nothing."""
    with tempfile.NamedTemporaryFile() as seen:
        command = ["strace", "-f", "-o", seen.name, "-e", "trace=%file", *IMPORT]
        subprocess.run(command, check=True)
        lines = Path(seen.name).read_text(errors="replace").splitlines()
    calls = [line for line in lines if "(" in line]
    return {
        "all": len(calls),
        "open": sum("open" in call.split("(")[0] for call in calls),
        "in vain": sum("ENOENT" in call for call in calls),
    }


if __name__ == "__main__":
    main()
