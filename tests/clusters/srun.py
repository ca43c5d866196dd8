"""A stand-in for Slurm's srun: a task on each host that HOSTS_OF_SRUN names, as in a real step."""

import argparse
import json
import os
import signal
import subprocess
import sys

_ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""symmetric-run ends by `ray stop`, which ends every Ray that it sees: on a host, its own."""


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task"):
        parser.add_argument(option, type=int)
    parser.add_argument("--kill-on-bad-exit", type=int, default=0)
    parser.add_argument("--cpu-bind")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--nodelist")
    parser.add_argument("--exclude")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    wanted = parser.parse_args()
    hosts: dict[str, list[str]] = json.loads(os.environ["HOSTS_OF_SRUN"])
    chosen = [
        prefix
        for name, prefix in hosts.items()
        if wanted.nodelist in (None, name) and wanted.exclude != name
    ]
    if not len(chosen) == wanted.nodes == wanted.ntasks:
        sys.exit(f"srun: {len(chosen)} nodes for {sys.argv}")
    alone = _ALONE if "symmetric-run" in wanted.command else []
    tasks = {subprocess.Popen([*prefix, *alone, *wanted.command]).pid for prefix in chosen}
    return _wait(tasks, bool(wanted.kill_on_bad_exit))


def _wait(tasks: set[int], kill_on_bad_exit: bool) -> int:
    """For all of them; the first exit status that is not 0."""
    first = 0
    while tasks:
        pid, status = os.wait()
        tasks.discard(pid)
        first = first or abs(os.waitstatus_to_exitcode(status))
        if first and kill_on_bad_exit:
            for task in tasks:
                os.kill(task, signal.SIGKILL)
    return first


if __name__ == "__main__":
    sys.exit(main())
