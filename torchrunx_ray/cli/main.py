"""The command `torchrunx-ray`."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from torchrunx_ray.cli.console import say
from torchrunx_ray.cli.grammar import PROGRAM, UsageError

_INTERRUPTED = 130
_WRONG_USAGE = 2


def main() -> NoReturn:
    """Run the command line, and exit with its status."""
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # before the run began, or if --signals-to-handle leaves SIGINT out
        say("interrupted")
        os._exit(_INTERRUPTED)
    from torchrunx_ray.cli.leaving import leave

    leave(status)


def run(arguments: Sequence[str]) -> int:
    """Run a command line. Return the exit status."""
    from torchrunx_ray.cli.wanted import wanted

    try:
        command = wanted(arguments)
    except UsageError as error:
        say(f"error: {error}")
        say(
            f"usage: {PROGRAM} [options] script.py [arguments of the script]; --help explains the options"
        )
        return _WRONG_USAGE
    from torchrunx_ray.cli.launching import launch

    return launch(command)
