"""Start of the keepers, which start the template."""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrunx_ray.agent import timer_file
from torchrunx_ray.agent.held_lease import HeldLease
from torchrunx_ray.agent.template_environment import python_path, search_path
from torchrunx_ray.wire import folder
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.environment import MARK
from torchrunx_ray.wire.messages import TemplateSetup, TemplateWanted
from torchrunx_ray.wire.title import PADDING

_PACKAGE_PARENT = str(Path(__file__).parents[2])


class Keeper:
    """The outer keeper's process, and the agent's ends of the channel and pipes of keeper and template.

    `alive_fd` reaches EOF when both keepers have ended.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        cwd: str,
        wanted: TemplateWanted,
        runtime_env: Mapping[str, Any],
    ) -> None:
        self.mark = uuid.uuid4().hex
        self._held_folder: folder.Folder | None = None
        self.begun_ns = now_ns()
        self.folder = folder.path_of(self.mark)
        """Folder for files that workers find by their path. It is missing if the host has no room for it."""
        self.timer_file = timer_file.wanted_path(environment, cwd, self.folder)
        setup = TemplateSetup(
            tuple(search_path(wanted, environment, cwd, runtime_env)),
            python_path(environment, runtime_env),
            wanted.preload,
            wanted.start_method,
        )
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            self.channel, channel = Channel.pair()
            ours.callback(self.channel.close)
            theirs.callback(channel.close)
            self.alive_fd, alive = _pipe(ours, theirs)
            self.stdout_fd, stdout = _pipe(ours, theirs)
            self.stderr_fd, stderr = _pipe(ours, theirs)
            self.lease = HeldLease()
            ours.callback(self.lease.close)
            for fd in self.lease.fds:
                theirs.callback(os.close, fd)
            folder_fds = self._make_folder(ours)
            passed_fds = [channel.fileno(), alive, *self.lease.fds, *folder_fds]
            module = "torchrunx_ray.worker.keeper"
            # With -P and this PYTHONPATH the process finds this package and nothing else. The template later sets
            # sys.path (the agent's, with the worker's PYTHONPATH) and restores the variable.
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", module),
                    *map(str, passed_fds),
                    str(self.folder),
                    PADDING,
                ],
                env={**environment, "PYTHONPATH": _PACKAGE_PARENT, MARK: self.mark},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=passed_fds,
                # Ray kills a dead agent's group. In that group, the keeper would die before it has cleaned up.
                process_group=0,
            )
            try:
                self.channel.send(setup)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the process died at once, which `alive_fd` shows
            except OSError:
                self.process.kill()
                self.process.wait()
                raise
            ours.pop_all()

    def _make_folder(self, ours: contextlib.ExitStack) -> list[int]:
        """Make the folder, and return the descriptor that holds it; none if it cannot be made."""
        try:
            folder.sweep()
            self._held_folder = folder.Folder(self.folder)
        except OSError:  # workers can do without
            return []
        ours.callback(self.end_folder)
        return [self._held_folder.fd]

    def end_folder(self) -> None:
        """Remove the folder, whose keepers may have been killed."""
        if self._held_folder is not None:
            self._held_folder.close()
            folder.remove(str(self.folder))


def _pipe(readers: contextlib.ExitStack, writers: contextlib.ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe()
    readers.callback(os.close, reader)
    writers.callback(os.close, writer)
    return reader, writer
