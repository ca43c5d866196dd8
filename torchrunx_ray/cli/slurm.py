"""A check against a command that Slurm starts several times."""

import contextlib
import os
from pathlib import Path

from torchrunx_ray.cli.grammar import PROGRAM, UsageError
from torchrunx_ray.wire import proc

_TASKS = "SLURM_STEP_NUM_TASKS"

_RUNS_IT_ONCE = b"symmetric-run"
"""Ray's command that each task of a step runs, and that starts its own command in one of them only."""


def check_is_started_once() -> None:
    """Raise UsageError if each task of a step of `srun` runs the command."""
    tasks = os.environ.get(_TASKS, "1")
    if tasks in ("", "0", "1") or _is_below_symmetric_run():
        return
    raise UsageError(
        f"`srun` starts this command {tasks} times ({_TASKS}={tasks}), and each would run the script on all hosts. Start it "
        f"once: `srun --ntasks=1 {PROGRAM} …`, or below `ray symmetric-run`"
    )


def _is_below_symmetric_run() -> bool:
    with contextlib.suppress(OSError):  # an ancestor has just ended
        for pid in proc.ancestors(os.getpid()):
            if _RUNS_IT_ONCE in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False
