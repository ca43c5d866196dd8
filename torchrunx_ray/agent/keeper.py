"""Starting the keepers, which start the template."""

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from torchrunx_ray.agent.host import search_path
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.environment import MARK
from torchrunx_ray.wire.messages import TemplateSetup, TemplateWanted
from torchrunx_ray.wire.title import PADDING

_PACKAGE_PARENT = str(Path(__file__).parents[2])


class Keeper:
    """The outer keeper's process, and our ends of what it and the template were given.

    `alive_fd` comes to its end when both keepers have ended.
    """

    def __init__(self, environment: Mapping[str, str], cwd: str, wanted: TemplateWanted) -> None:
        self.mark = uuid.uuid4().hex
        self.begun_ns = now_ns()
        self.channel, theirs = Channel.pair()
        self.alive_fd, alive = os.pipe()
        self.stdout_fd, stdout = os.pipe()
        self.stderr_fd, stderr = os.pipe()
        inherited = [theirs.fileno(), alive]
        # -P and PYTHONPATH find this package and nothing else. The template then takes over the
        # agent's sys.path with the worker's PYTHONPATH, and puts the variable back.
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "torchrunx_ray.worker.keeper",
                *map(str, inherited),
                PADDING,
            ],
            env={**environment, "PYTHONPATH": _PACKAGE_PARENT, MARK: self.mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=inherited,
            # Ray ends a dead agent's group, which would be before the keeper has ended its own.
            process_group=0,
        )
        theirs.close()
        os.close(alive)
        os.close(stdout)
        os.close(stderr)
        self.channel.send(
            TemplateSetup(
                tuple(search_path(wanted, environment, cwd)),
                environment.get("PYTHONPATH"),
                wanted.preload,
                wanted.start_method,
            )
        )
