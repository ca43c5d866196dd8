"""The launch of a script: from the cluster to the exit status."""

import logging
import os
import signal
from typing import Any

from ray.exceptions import RayError

from torchrunx_ray.cli.console import say, with_names_of_options
from torchrunx_ray.cli.last_words import report
from torchrunx_ray.cli.script_run import ScriptRun
from torchrunx_ray.cli.signals import Signals
from torchrunx_ray.cli.wanted import Wanted
from torchrunx_ray.driver.cluster import connection, inventory
from torchrunx_ray.errors import LaunchError

_FAILED = 1


def launch(wanted: Wanted) -> int:
    """Run the script on its hosts. Return the exit status."""
    if wanted.unneeded:
        say(f"{', '.join(wanted.unneeded)}: not needed, since Ray finds the hosts")
    try:
        _connect(wanted)
        run = ScriptRun(wanted)
    except (LaunchError, RayError, OSError, ValueError, RuntimeError) as error:
        say(f"error: {with_names_of_options(str(error))}")
        return _FAILED
    if inventory.was_started_here() and wanted.address is None:
        say("no Ray is running here, so this command has started one for itself")
    signals = Signals(run.stop, run.kill)
    try:
        with signals.handled(wanted.signals, may_restart=wanted.launcher.may_restart):
            failures = run.failures()
    except (LaunchError, RayError, OSError, ValueError) as error:
        say(f"error: {with_names_of_options(str(error))}")
        return _FAILED
    if signals.first is not None:
        say(f"stopped by {signals.first.name}")
    if failures is not None:
        report(wanted.script.name, failures, run.setup.files.root)
    return _FAILED if signals.first is not None or failures is not None else os.EX_OK


def _ray_options(wanted: Wanted) -> dict[str, Any]:
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if wanted.address is not None:
        options["address"] = wanted.address
    if wanted.address == "local":
        options["include_dashboard"] = False  # it takes 5 s to start
    if wanted.working_dir is not None:
        options["runtime_env"] = {"working_dir": wanted.working_dir}
    return options


def _connect(wanted: Wanted) -> None:
    """Join or start the cluster. A Ray that this command starts ignores SIGUSR1, which Slurm sends to all processes.

    Ray installs a handler for SIGTERM, also if it was ignored.
    """
    spared = [
        each
        for each in wanted.signals
        if each in (signal.SIGUSR1, signal.SIGUSR2) or signal.getsignal(each) is signal.SIG_IGN
    ]
    before = {each: signal.signal(each, signal.SIG_IGN) for each in spared}
    try:
        connection.connect(_ray_options(wanted))
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
