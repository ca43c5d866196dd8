"""Lines of the command itself, on stderr."""

import contextlib
import sys

from torchrunx_ray.cli.grammar import PROGRAM


def say(text: str) -> None:
    """Write a line that names the command."""
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(f"{PROGRAM}: {text}", file=sys.stderr)  # noqa: T201
