"""What needs a card. Skips itself where there is none."""

import os

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
import torchrunx_ray.torchrunx as torchrunx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 2**20


@pytest.fixture
def on_one_gpu(cluster: None) -> trx.Launcher:
    return trx.Launcher(hostnames=1, workers_per_host=1, gpus_per_worker=1)


def test_nccl_joins_and_reduces_on_the_workers_device(on_one_gpu: trx.Launcher) -> None:
    def reduce() -> tuple[str, int, float]:
        value = torch.ones(1, device="cuda")
        dist.all_reduce(value)
        return dist.get_backend(), torch.cuda.current_device(), value.item()

    assert on_one_gpu.run(reduce).rank(0) == ("nccl", 0, 1.0)


def test_cuda_works_after_the_fork_in_every_run(on_one_gpu: trx.Launcher) -> None:
    def compute() -> float:
        matrix = torch.eye(64, device="cuda")
        return (matrix @ matrix).sum().item()

    with on_one_gpu.session() as session:
        assert [session.run(compute).rank(0) for _ in range(3)] == [64.0] * 3


def test_cuda_tensors_go_in_and_come_out(on_one_gpu: trx.Launcher) -> None:
    def double(tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return tensor.device.type, tensor * 2

    where, doubled = on_one_gpu.run(double, torch.ones(10_000, device="cuda")).rank(0)

    assert where == doubled.device.type == "cuda"
    assert doubled.sum().item() == 20_000


def test_memory_of_the_card_is_free_again(on_one_gpu: trx.Launcher) -> None:
    def take() -> int:
        return torch.ones(500 * MIB, dtype=torch.uint8, device="cuda").sum().item()

    on_one_gpu.run(take)
    before, _ = torch.cuda.mem_get_info()
    on_one_gpu.run(take)
    after, _ = torch.cuda.mem_get_info()

    assert abs(before - after) < 50 * MIB


def test_launch_without_gpus_sees_none(cluster: None) -> None:
    launcher = trx.Launcher(hostnames=1, workers_per_host=2, gpus_per_worker=0)

    assert list(launcher.run(torch.cuda.device_count)) == [0, 0]


def test_visible_devices_are_those_of_the_launch(on_one_gpu: trx.Launcher) -> None:
    visible = on_one_gpu.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).rank(0)

    assert len(visible.split(",")) == 1


def test_two_nccl_ranks_on_one_card_are_refused() -> None:
    with pytest.raises(ValueError, match="nccl"):
        trx.Launcher(workers_per_host=2, gpus_per_worker=0.5, backend="nccl")


def test_defaults_of_the_drop_in_for_torchrunx_take_every_gpu(cluster: None) -> None:
    result = torchrunx.Launcher().run(
        lambda: (dist.get_backend(), dist.get_world_size(), torch.cuda.device_count())
    )

    count = torch.cuda.device_count()
    assert list(result) == [("nccl", count, count)] * count
