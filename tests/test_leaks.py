"""Arguments and values go when nobody uses them any more."""

import contextlib
import gc
import os
import signal
import time
import weakref
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

import torchrunx_ray as trx
from tests import processes
from tests.traces import objects_in_store


def test_session_does_not_keep_the_values_of_its_runs(cluster: None) -> None:
    """It held every run, and so every value, until it was closed."""
    with trx.Launcher(workers_per_host=1).session() as session:
        result = weakref.ref(session.run(os.getpid))
        gc.collect()
        assert result() is None


@pytest.mark.parametrize("how", ["return", "raise", "agent", "cancel"])
def test_what_ended_leaves_rays_store_before_python_collects_garbage(
    cluster: None, how: str, tmp_path: Path
) -> None:
    """Reference cycles kept arguments (killed agent, cancelled run), and values (in a session)."""

    def end(large: torch.Tensor) -> torch.Tensor:
        processes.note(tmp_path / str(os.getpid()), "")
        if how == "raise":
            raise ValueError
        if how == "agent":
            os.kill(processes.agent_pid(), signal.SIGKILL)
        while how != "return":
            time.sleep(0.01)
        return large

    with trx.Launcher(workers_per_host=1).session() as session:
        gc.collect()  # what other tests left
        before = objects_in_store()
        gc.disable()
        try:
            run = session.submit(end, torch.zeros(2**20))
            assert processes.wait_until(lambda: any(tmp_path.iterdir()), 30)
            if how == "cancel":
                run.cancel()
            with contextlib.suppress(ValueError, trx.AgentFailedError, CancelledError):
                run.result(timeout=30)
            del run
            assert processes.wait_until(lambda: objects_in_store() <= before, 5)
        finally:
            gc.enable()
