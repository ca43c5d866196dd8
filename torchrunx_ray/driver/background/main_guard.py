"""Protection against scripts without a `__main__` guard.

A process that multiprocessing spawns imports the script, and would launch again.
"""

import multiprocessing
from collections.abc import Iterable

_REFUSAL = (
    "A process that multiprocessing started tried to launch while it imported your script. "
    'Put the launch under `if __name__ == "__main__":`.'
)


def refuse_if_the_script_is_only_imported() -> None:
    # Set while a spawned child imports the script. A launch at that time would spawn more such children.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(_REFUSAL)


def advice(last_lines: Iterable[str]) -> str | None:
    """Repeat the refusal if it is in a rank's last lines of stderr, where a child of the rank printed it."""
    if any(_REFUSAL in line for line in last_lines):
        return f"A child process of this rank failed with: {_REFUSAL}"
    return None
