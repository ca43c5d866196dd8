"""Launches stay fast, in units of what importing torch takes in the same minute.

The best of some tries on each side: what else the machine does only adds. A change that doubles a
launch's time fails.
"""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def best_s(call: Callable[[], object], tries: int) -> float:
    taken: list[float] = []
    for _ in range(tries):
        begun = time.monotonic()
        call()
        taken.append(time.monotonic() - begun)
    return min(taken)


def import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import torch, torch.distributed"], check=True)


@pytest.fixture
def no_op() -> Callable[[], None]:
    """Pickled by value: a worker need not import pytest for it."""

    def all_reduce() -> None:
        dist.all_reduce(torch.ones(1))

    return all_reduce


def test_cold_launch_costs_about_one_import(cluster: None, no_op: Callable[[], None]) -> None:
    launcher = trx.Launcher(workers_per_host=4, linger=0)
    cold_s = best_s(lambda: launcher.run(no_op), 4)
    floor_s = best_s(import_torch, 5)

    assert cold_s < 1.7 * floor_s


def test_warm_launches_cost_a_part_of_that(cluster: None, no_op: Callable[[], None]) -> None:
    launcher = trx.Launcher(workers_per_host=4)
    launcher.run(no_op)
    plain_s = best_s(lambda: launcher.run(no_op), 20)
    with launcher.session() as session:
        in_session_s = best_s(lambda: session.run(no_op), 20)
    floor_s = best_s(import_torch, 5)

    assert plain_s < 0.13 * floor_s
    assert in_session_s < 0.11 * floor_s


def test_next_launch_of_a_training_step_does_not_import_again(cluster: None) -> None:
    """DDP and its optimiser need torch._dynamo, which takes each worker half of the floor."""

    def step() -> None:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
        optimiser = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 8)).sum().backward()
        optimiser.step()

    launcher = trx.Launcher(workers_per_host=4)
    for _ in range(2):  # the second one waits for the template, which imports it
        launcher.run(step)
    warm_s = best_s(lambda: launcher.run(step), 10)

    assert warm_s < 0.25 * best_s(import_torch, 5)


def test_failure_ends_a_warm_launch_in_a_part_of_that(cluster: None) -> None:
    """With the failing rank's exception, and after the rank that would sleep on was stopped."""

    def fail_or_sleep() -> None:
        if dist.get_rank() == 1:
            raise ValueError("on rank 1")
        time.sleep(1000)

    launcher = trx.Launcher(workers_per_host=2, shutdown_timeout=60)

    def launch() -> None:
        with pytest.raises(ValueError, match="on rank 1"):
            launcher.run(fail_or_sleep)

    launch()
    assert best_s(launch, 10) < 0.4 * best_s(import_torch, 5)
