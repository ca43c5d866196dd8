"""A function may make process groups of its own, at our address or at any other."""

import dataclasses
import errno
import os
import socket

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from torchrunx_ray.wire.messages import StartMethod


def total() -> float:
    tensor = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(tensor)
    return tensor.item()


def four_groups_in_a_row() -> list[float]:
    if dist.is_initialized():
        dist.destroy_process_group()
    totals: list[float] = []
    for _ in range(4):
        dist.init_process_group("gloo")
        totals.append(total())
        dist.destroy_process_group()
    return totals


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "gloo"])
@pytest.mark.parametrize(
    "attempt", [0, *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(1, 10))]
)
def test_four_groups_in_a_row(cluster: None, backend: str | None, attempt: int) -> None:
    result = trx.Launcher(workers_per_host=4, backend=backend).run(four_groups_in_a_row)

    assert list(result) == [[6.0] * 4] * 4


@pytest.mark.slow
@pytest.mark.parametrize("preload", [("torch", "torch.distributed"), ()])
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.exhaustive
def test_torch_that_is_imported_late_uses_the_launchs_store_too(
    cluster: None, preload: tuple[str, ...], start_method: StartMethod
) -> None:
    def import_and_join() -> float:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(1.0)
        for _ in range(2):
            dist.init_process_group("gloo")
            dist.all_reduce(tensor)
            dist.destroy_process_group()
        return tensor.item()

    launcher = trx.Launcher(
        workers_per_host=2, backend=None, preload=preload, start_method=start_method
    )

    assert list(launcher.run(import_and_join)) == [4.0, 4.0]


@pytest.mark.slow
def test_group_at_our_address_given_as_tcp(cluster: None) -> None:
    def join() -> float:
        address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        totals = 0.0
        for _ in range(2):
            dist.init_process_group("gloo", address, rank=rank, world_size=world_size)
            totals += total()
            dist.destroy_process_group()
        return totals

    assert list(trx.Launcher(workers_per_host=4, backend=None).run(join)) == [12.0] * 4


@pytest.mark.slow
def test_group_at_an_address_of_its_own(cluster: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def join() -> float:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", address, rank=rank, world_size=world_size)
        return total()

    assert list(trx.Launcher(workers_per_host=4, backend=None).run(join)) == [6.0] * 4


def test_group_at_a_port_of_the_functions_own(cluster: None) -> None:
    """MASTER_PORT was read when the group was made: a function that set it met nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def join() -> int:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
        dist.init_process_group("gloo")
        dist.barrier()  # the store is in rank 0's process, which may end before its peer has joined
        return dist.get_world_size()

    assert list(trx.Launcher(workers_per_host=2, backend=None).run(join)) == [2, 2]


@pytest.mark.slow
def test_group_of_some_ranks_does_not_disturb_the_next_of_all(cluster: None) -> None:
    def join() -> float:
        rank = int(os.environ["RANK"])
        if rank < 2:
            dist.init_process_group("gloo", rank=rank, world_size=2)
            total()
            dist.destroy_process_group()
        dist.init_process_group("gloo")
        return total()

    assert list(trx.Launcher(workers_per_host=4, backend=None).run(join)) == [6.0] * 4


def test_second_group_beside_ours_says_who_made_the_first(launcher: trx.Launcher) -> None:
    with pytest.raises(ValueError, match="twice") as caught:
        launcher.run(dist.init_process_group, "gloo")

    assert any("launch with backend=None" in note for note in caught.value.__notes__)


def test_subgroups_work(cluster: None) -> None:
    def pairs() -> float:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        tensor = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(tensor, group=groups[dist.get_rank() // 2])
        return tensor.item()

    assert list(trx.Launcher(workers_per_host=4).run(pairs)) == [1.0, 1.0, 5.0, 5.0]


def test_squatter_cannot_take_the_port(launcher: trx.Launcher) -> None:
    """The agent holds it from the moment it is chosen, and nobody binds it again."""

    def squat_and_join() -> tuple[str, float]:
        with socket.socket() as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                squatter.bind(("", int(os.environ["MASTER_PORT"])))
                squatter.listen()
                squatted = "yes"
            except OSError as error:
                squatted = errno.errorcode[error.errno]
            dist.init_process_group("gloo")
            total = torch.ones(1)
            dist.all_reduce(total)
        return squatted, total.item()

    own_group = dataclasses.replace(launcher, backend=None)
    assert list(own_group.run(squat_and_join)) == [("EADDRINUSE", 2.0)] * 2


def test_fake_backend_is_a_group_that_sends_nothing(launcher: trx.Launcher) -> None:
    """Torch registers it only when its module is imported: "Unknown c10d backend type FAKE"."""

    def reduce() -> tuple[str, float]:
        return dist.get_backend(), total()

    fake = dataclasses.replace(launcher, backend="fake")
    assert list(fake.run(reduce)) == [("fake", 0.0), ("fake", 1.0)]
