"""The run of a script."""

import os
import signal
import uuid
from collections.abc import Mapping
from typing import Any

from torchrunx_ray.cli.files import OutputFiles
from torchrunx_ray.cli.wanted import Wanted
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.call.pack_call import put_call
from torchrunx_ray.driver.output.speaker import Sink
from torchrunx_ray.driver.output.to_destinations import ToDestinations
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.run import Run, failures_of
from torchrunx_ray.driver.running.crew import Crew, GroupPlan
from torchrunx_ray.driver.running.supervisor import run_once
from torchrunx_ray.driver.terminal.summary import follow
from torchrunx_ray.wire.ranks import Part, Place, first_gpu
from torchrunx_ray.worker.function import script

_NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class ScriptSetup:
    """Variables of the workers, and places for their output, as torchrun has them."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.run_id = wanted.run_id or str(uuid.uuid4())
        self.files = OutputFiles(wanted.output, self.run_id, wanted.role)
        self._sink = ToDestinations()

    @property
    def sink(self) -> Sink:
        return self._sink

    def plan(self, crew: Crew, attempt: int, restarts: int) -> GroupPlan:
        self._sink.expect(attempt, self.files.destinations(crew, restarts))
        return GroupPlan(
            part=Part(0, len(crew.places), len(crew.hosts)),
            store=None,
            variables=[self._variables(crew, place) for place in crew.places],
        )

    def _variables(self, crew: Crew, place: Place) -> dict[str, str]:
        """Return what torchrun sets and a launch of a function does not."""
        explicit: Mapping[str, str] = self._wanted.launcher.explicit_variables()
        variables = {
            "ROLE_NAME": self._wanted.role,
            "TORCHELASTIC_RUN_ID": self.run_id,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            _NCCL_ERRORS: explicit.get(_NCCL_ERRORS) or os.environ.get(_NCCL_ERRORS, "1"),
        }
        if self._wanted.has_virtual_local_ranks:
            variables |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": _own_gpu(crew, place)}
        return variables


class ScriptRun:
    """A script on its workers."""

    def __init__(self, wanted: Wanted) -> None:
        """Begin the run. The driver must be connected to its cluster."""
        self.setup = ScriptSetup(wanted)
        launcher = wanted.launcher
        call = put_call(script.run, (wanted.script, wanted.numa_binding), {}, launcher)
        self._progress = Progress(call.run_name)
        self._loop = loop.running()  # not in a signal handler: it takes a lock
        life = follow(
            lambda: run_once(launcher, call, self._progress, self.setup), self._progress, launcher
        )
        self._run = Run[Any](life, self._progress, launcher.shutdown_timeout)

    def failures(self) -> Failures | None:
        """Wait for the end. Return all failures, or those from before the stop of the run; None if there are none.

        Raises the error of a run that had no workers.
        """
        return failures_of(self._run)

    def stop(self, signum: signal.Signals) -> None:
        """Send the signal to the workers, and SIGKILL after `shutdown_timeout`. A signal handler may call this."""
        self._loop.call_soon_threadsafe(self._stop_by, signum)
        self._run.cancel()

    def kill(self) -> None:
        """Send SIGKILL to the workers. A signal handler may call this."""
        self._run.kill()

    def _stop_by(self, signum: signal.Signals) -> None:
        if (supervisor := self._progress.supervisor) is not None:
            supervisor.stop_by(signum)


def _own_gpu(crew: Crew, place: Place) -> str:
    gpu_ids = crew.gpu_ids[place.host_index]
    if not gpu_ids:
        return ""
    return gpu_ids[first_gpu(crew.hosts[place.host_index].gpus_per_worker, place.local_rank)]
