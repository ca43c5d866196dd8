"""A launch inside a Ray task that is killed, and what it held."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

import torchrunx_ray as trx
from tests.processes import wait_until


@pytest.mark.slow
def test_room_of_a_killed_task_is_given_back_to_the_next_launch(
    cluster: None, tmp_path: Path
) -> None:
    untyped: Any = ray

    @untyped.remote(num_cpus=0, max_retries=0)
    def launch_everything() -> None:
        trx.Launcher(workers_per_host=8, linger=0).run(announce_and_sleep, tmp_path, os.getpid())

    task = launch_everything.remote()
    assert wait_until(lambda: any(tmp_path.iterdir()), 60)
    living = trx.Launcher(workers_per_host=1, placement_timeout=1)
    with pytest.raises(trx.PlacementError):
        living.run(os.getpid)
    (driver,) = tmp_path.iterdir()
    os.kill(int(driver.name), signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(task)

    result = trx.Launcher(workers_per_host=8, placement_timeout=20).run(os.getpid)
    assert len(result) == 8


def announce_and_sleep(folder: Path, driver: int) -> None:
    import time

    (folder / str(driver)).touch()
    time.sleep(1000)
