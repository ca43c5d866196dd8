"""Values go in and come out without needless copies, and nothing of them stays behind."""

import concurrent.futures
import dataclasses
import enum
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

import torchrunx_ray as trx
from tests import processes
from tests.memory import MIB, megabytes, proportional_anon, status
from tests.soon import soon


@pytest.mark.slow
def test_references_are_resolved_at_any_depth(launcher: trx.Launcher) -> None:
    @ray.remote(num_cpus=0)
    def make() -> dict[str, np.ndarray[Any, Any]]:
        return {"weights": np.ones(10_000)}

    def look(first: Any, *, config: dict[str, Any]) -> tuple[bool, float, float, int]:
        same = first[0] is config["deep"][1]
        return same, first[0].sum().item(), config["made"]["weights"].sum(), captured_value()

    def captured_value() -> int:
        return captured  # pyright: ignore[reportReturnType]  # it is the value there

    tensor = ray.put(torch.ones(10_000))
    captured = ray.put(42)
    result = launcher.run(look, [tensor], config={"deep": (0, tensor), "made": make.remote()})

    assert list(result) == [(True, 10_000.0, 10_000.0, 42)] * 2


def test_what_a_launch_returned_goes_into_the_next_by_reference(launcher: trx.Launcher) -> None:
    first = launcher.run(lambda: torch.full((10_000,), float(os.environ["RANK"])))
    second = launcher.run(lambda a, b: (a - b).sum().item(), first.ref(1), first.ref(0))

    assert list(second) == [10_000.0] * 2


def test_values_that_came_by_reference_are_each_ranks_own(launcher: trx.Launcher) -> None:
    def write(tensor: torch.Tensor) -> float:
        return tensor.add_(1).sum().item()

    ref = ray.put(torch.zeros(10_000))

    assert list(launcher.run(write, ref)) == [10_000.0] * 2
    assert ray.get(ref).sum() == 0


def test_arrays_that_came_by_reference_may_be_written_to(launcher: trx.Launcher) -> None:
    """Ray's own are read-only, and so were the workers' copies of them."""

    def add(array: np.ndarray[Any, Any]) -> float:
        array += 1
        return float(array[-1, -1])

    given = np.zeros((1000, 100))
    assert list(launcher.run(add, ray.put(given))) == [1, 1]
    assert list(launcher.run(add, ray.put(given[:, ::2]))) == [1, 1]


def test_dataclass_of_the_script_comes_by_reference(one: trx.Launcher) -> None:
    """Ray's copy of cloudpickle makes a second dataclasses.MISSING."""

    @dataclasses.dataclass
    class Batch:
        size: int
        names: list[str] = dataclasses.field(default_factory=list[str])

    def look(batch: Any) -> tuple[int, bool]:
        return batch.size, dataclasses.fields(batch)[0].default is dataclasses.MISSING

    assert one.run(look, ray.put(Batch(3))).rank(0) == (3, True)


def test_what_comes_by_reference_is_of_the_functions_own_classes(one: trx.Launcher) -> None:
    """Ray's copy of cloudpickle and cloudpickle itself each keep account of classes."""

    class Early:
        pass

    class Late:
        pass

    class Mode(enum.Enum):
        A = 1

    def make() -> Any:
        class Made:
            pass

        return Late, Made

    early = ray.put((Early(), Mode.A))
    _, made = one.run(make).rank(0)
    late = ray.put((Late(), made()))

    def look(first: Any, second: Any) -> list[bool]:
        kinds = [type(each) for each in (*first, *second)]
        return [*map(operator.is_, kinds, [Early, Mode, Late, made]), first[1] is Mode.A]

    assert one.run(look, early, late).rank(0) == [True] * 5


def test_reference_whose_task_failed_is_told(launcher: trx.Launcher) -> None:
    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise KeyError("in the task")

    with pytest.raises(trx.PayloadError, match="an ObjectRef in the arguments") as caught:
        launcher.run(print, [fail.remote()])
    assert "KeyError: 'in the task'" in str(caught.value)
    assert caught.value.step == "fetch"


def test_reference_inside_of_anothers_value_is_refused(launcher: trx.Launcher) -> None:
    """It arrived as a reference that nobody could resolve."""
    with pytest.raises(
        trx.PayloadError, match="it is an ObjectRef inside the value of another ObjectRef"
    ):
        launcher.run(print, ray.put([ray.put(1)]))


@pytest.mark.slow
def test_launch_takes_no_hosts_before_its_arguments_are_there(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It held the CPUs that the task of its argument waited for."""
    gate = tmp_path / "gate"

    @ray.remote(num_cpus=8)
    def make() -> int:
        while not gate.exists():
            time.sleep(0.01)
        return 42

    launcher = trx.Launcher(hostnames=1, workers_per_host=8, backend=None)
    run = launcher.submit(lambda value: value, make.remote())
    assert processes.wait_until(lambda: "waiting for 1 of 1 ObjectRefs" in caplog.text, 10)
    assert "room in the Ray cluster" not in caplog.text
    gate.touch()

    assert run.result(timeout=60).rank(7) == 42


def test_cancel_does_not_wait_for_an_argument(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It took 17 s: the agent had not begun, and so did not report its end."""

    @ray.remote(num_cpus=0)
    def make() -> None:
        time.sleep(30)

    run = trx.Launcher(hostnames=1, workers_per_host=1, backend=None).submit(print, make.remote())
    assert processes.wait_until(lambda: "waiting for 1 of 1 ObjectRefs" in caplog.text, 10)
    run.cancel()

    with soon(), pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=30)


def test_handle_of_an_actor_is_refused_with_its_path(launcher: trx.Launcher) -> None:
    class Counter:
        pass

    actor: Any = ray.remote(num_cpus=0)(Counter)

    with pytest.raises(trx.PayloadError, match=r"^args\[0\]\['counter'\] cannot be pickled: "):
        launcher.run(print, {"counter": actor.remote()})


def test_tensors_arrive_writable_and_arrays_as_rays_views(launcher: trx.Launcher) -> None:
    result = launcher.run(lambda: (torch.zeros(10_000), np.zeros(10_000)))
    tensor, array = result.rank(0)

    assert tensor.add_(1).sum() == 10_000
    assert not array.flags.writeable
    assert result.rank(0)[0].sum() == 0, "the one in the cluster is as it was"


def test_ranks_own_values_share_nothing(launcher: trx.Launcher) -> None:
    def give_back(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    first, second = launcher.run(give_back, torch.zeros(10_000))
    first.add_(1)

    assert second.sum() == 0


@pytest.mark.slow
def test_argument_is_held_once_for_all_workers(cluster: None) -> None:
    """Beside Ray's store, whatever the number of workers."""
    launcher = trx.Launcher(workers_per_host=4, backend="gloo")

    def use(tensor: torch.Tensor) -> tuple[int, int]:
        torch.distributed.barrier()
        total = int(tensor.sum(dtype=torch.int64))
        torch.distributed.barrier()
        pids = [os.getpid()]
        if os.environ["RANK"] == "0":
            pids += processes.above(os.getpid()).values()
        share = sum(map(proportional_anon, pids))
        torch.distributed.barrier()
        return total, share

    before = sum(memory for _, memory in launcher.run(use, megabytes(1)))
    argument = megabytes(200)
    result = list(launcher.run(use, argument))

    assert {total for total, _ in result} == {200 * MIB}
    grown = sum(memory for _, memory in result) - before
    assert 0.8 * 200 * MIB < grown < 1.5 * 200 * MIB


def test_agent_keeps_no_copy_of_a_value_that_is_rays(cluster: None) -> None:
    with trx.Launcher(workers_per_host=2, backend=None).session() as session:
        agent, _ = session.run(lambda: (processes.agent_pid(), megabytes(1))).rank(0)
        before = status(agent, "RssAnon")
        result = session.run(lambda: (processes.agent_pid(), megabytes(200)))

        assert processes.wait_until(lambda: status(agent, "RssAnon") - before < 20 * MIB)
        assert result.rank(1)[0] == agent


def calls_meanwhile(run: "trx.Run[Any]", call: Callable[[], object]) -> float:
    """The longest that a call took, made again and again while a run goes on; as a part of the run."""
    longest, submitted = 0.0, time.monotonic()
    while not run.done():
        begun = time.monotonic()
        call()
        longest = max(longest, time.monotonic() - begun)
    return longest / (time.monotonic() - submitted)


@pytest.mark.alone
def test_large_value_on_its_way_does_not_block_the_agent(cluster: None) -> None:
    def names() -> set[str]:
        return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}

    others = names()
    launcher = trx.Launcher(workers_per_host=1, backend=None, extra_env_vars={"OWN_AGENT": "1"})
    launcher.run(os.getpid)
    (name,) = names() - others
    agent: Any = ray.get_actor(name, namespace="torchrunx_ray")
    run = launcher.submit(megabytes, 1024)

    assert calls_meanwhile(run, lambda: ray.get(agent.clock.remote())) < 0.5
    assert run.result().rank(0).shape == (1024 * MIB,)

    run = launcher.submit(megabytes, 1024)
    assert calls_meanwhile(run, run.stacks) < 0.5
    run.result()
