"""The core: a function runs on every worker, in one process group, and its values come back."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx


def test_every_launch_gets_new_processes(launcher: trx.Launcher) -> None:
    first, second = launcher.run(os.getpid), launcher.run(os.getpid)

    assert len({*first, *second}) == 4


def test_launch_takes_arguments_and_options(cluster: None) -> None:
    def collect(*args: int, **kwargs: int) -> tuple[tuple[int, ...], dict[str, int]]:
        return args, kwargs

    result = trx.launch(collect, (1, 2), {"three": 3}, hostnames=1, workers_per_host=1)

    assert result.rank(0) == ((1, 2), {"three": 3})


def test_arguments_may_have_any_name(launcher: trx.Launcher) -> None:
    """`func` and `self` were taken for our own."""

    def named(func: int, self: int) -> int:
        return func + self

    kwargs: dict[str, Any] = {"func": 1, "self": 2}
    assert trx.launch(named, func_kwargs=kwargs, workers_per_host=1).rank(0) == 3


def test_func_args_that_is_no_list_is_named(cluster: None) -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"func_args=3: expected a list or tuple, such as \(3,\)"):
        trx.launch(print, wrong)


def test_launch_refuses_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="workers"):
        trx.launch(print, workers=2)


def test_result_by_rank_by_place_and_all(launcher: trx.Launcher) -> None:
    result = launcher.run(lambda: int(os.environ["RANK"]) * 10)

    (hostname,) = result.hostnames
    assert len(result) == 2
    assert result.rank(1) == result.index(hostname, 1) == result.index(hostname, local_rank=1) == 10
    assert result.results == {hostname: [0, 10]}
    assert list(result) == [0, 10]
    assert hostname in repr(result)


def test_local_hostname_can_be_asked_for_in_the_result(cluster: None) -> None:
    result = trx.Launcher(hostnames=["localhost"], workers_per_host=1).run(os.getpid)

    assert result.index("localhost", 0) == result.rank(0)


def test_ref_is_the_value_for_ray(launcher: trx.Launcher) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def double(value: int) -> int:
        return 2 * value

    result = launcher.run(lambda: int(os.environ["RANK"]) + 20)

    assert ray.get(result.ref(1)) == 21
    assert ray.get(double.remote(result.ref(1))) == 42


@pytest.mark.parametrize("rank", [-1, 2, 100])
def test_rank_that_was_not_there(launcher: trx.Launcher, rank: int) -> None:
    result = launcher.run(os.getpid)

    with pytest.raises(IndexError, match="had ranks 0 to 1, not"):
        result.rank(rank)


def test_place_that_was_not_there(launcher: trx.Launcher) -> None:
    result = launcher.run(os.getpid)

    with pytest.raises(KeyError, match="'elsewhere' is not a host of this launch"):
        result.index("elsewhere", 0)
    with pytest.raises(IndexError, match="had local ranks 0 to 1, not 2"):
        result.index(result.hostnames[0], 2)


def test_without_a_process_group(cluster: None) -> None:
    result = trx.Launcher(workers_per_host=2, backend=None).run(dist.is_initialized)

    assert list(result) == [False, False]


def test_group_has_the_asked_backend_and_timeout(cluster: None) -> None:
    def look() -> tuple[str, float]:
        group = dist.distributed_c10d._get_default_group()
        options = group._get_backend(torch.device("cpu")).options
        return dist.get_backend(), options._timeout.total_seconds()

    result = trx.Launcher(workers_per_host=2, backend="cpu:gloo", timeout=77).run(look)

    assert result.rank(1) == ("cpu:gloo", 77.0) or result.rank(1) == ("gloo", 77.0)


@pytest.mark.slow
@pytest.mark.parametrize("times", [20, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_rank_that_returns_at_once_does_not_break_the_group_of_others(
    cluster: None, times: int
) -> None:
    """It ended while others still connected to it: "Gloo connectFullMesh failed", in 22 of 150."""
    with trx.Launcher(workers_per_host=8, cpus_per_worker=0.1).session() as session:
        for _ in range(times):
            assert list(session.run(lambda: 1)) == [1] * 8


def test_values_survive_the_agent(cluster: None) -> None:
    result = trx.Launcher(workers_per_host=2, linger=0).run(lambda: torch.arange(100_000))

    assert result.rank(1).sum() == 4999950000


@pytest.mark.parametrize("by_address", [False, True])
def test_agents_are_named_after_the_node_in_every_launch(cluster: None, by_address: bool) -> None:
    """A launch may call its hosts by their addresses, and the next one, with the same agents, by their names."""
    import ray

    def named() -> set[str]:
        return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True)}

    (node,) = ray.nodes()
    before = named()
    trx.Launcher(
        hostnames=[node["NodeManagerAddress"]] if by_address else 1,
        workers_per_host=1,
        extra_env_vars={"FOR_A_NEW_AGENT": str(by_address)},
    ).run(os.getpid)

    (new,) = {name for name in named() - before if name.startswith("agent-")}
    assert new.startswith(f"agent-{node['NodeManagerHostname']}-")
