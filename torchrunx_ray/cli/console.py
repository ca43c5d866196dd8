"""Lines of the command itself, on stderr."""

import contextlib
import re
import sys
from dataclasses import fields

from torchrunx_ray.cli.grammar import PROGRAM
from torchrunx_ray.driver.options.options import Options

_NAMES = {field.name: f"--{field.name.replace('_', '-')}" for field in fields(Options)} | {
    "hostnames": "--nnodes",
    "workers_per_host": "--nproc-per-node",
    "extra_env_vars": "--env",
    "placement_timeout": "--rdzv-conf=join_timeout",
}
"""The command's options, by the names of the launcher's."""

_NAME = re.compile(
    rf"\b({'|'.join(name for name in _NAMES if '_' in name or name == 'hostnames')})\b"
)


def say(text: str) -> None:
    """Write a line that names the command."""
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(f"{PROGRAM}: {text}", file=sys.stderr)  # noqa: T201


def with_names_of_options(text: str) -> str:
    """Return the message of a launcher with the names of the command's options."""
    return _NAME.sub(lambda found: _NAMES[found[1]], text)
