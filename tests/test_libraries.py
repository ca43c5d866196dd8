"""What a function does with torch and its like works in a forked worker as in a plain process."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from torchrunx_ray.wire.messages import StartMethod


@pytest.fixture(params=["fork", "spawn"])
def launcher(request: pytest.FixtureRequest, cluster: None) -> trx.Launcher:
    start_method: StartMethod = request.param
    return trx.Launcher(workers_per_host=2, start_method=start_method)


def test_ddp_with_data_loader_workers(launcher: trx.Launcher) -> None:
    class Squares(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
        """Of a class that no worker could import."""

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.tensor([index / 64])
            return x, x * x

    def train() -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        data = Squares()
        sampler = torch.utils.data.DistributedSampler(data)
        loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler, num_workers=2)
        losses: list[float] = []
        for _ in range(3):
            for x, y in loader:
                loss = torch.nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        weights = [torch.zeros(1, 1) for _ in range(2)]
        dist.all_gather(weights, model.module.weight.detach())
        assert torch.equal(*weights)
        return losses

    for losses in launcher.run(train):
        assert len(losses) == 12
        assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile(launcher: trx.Launcher, tmp_path: Path) -> None:
    def compile_and_call() -> float:
        import os

        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / os.environ["RANK"])
        return torch.compile(lambda x: (x.sin() + 1).sum())(torch.zeros(1000)).item()

    assert list(launcher.run(compile_and_call)) == [1000.0, 1000.0]


def test_parallel_regions_of_openmp_and_numpy(cluster: None) -> None:
    """One worker, so that it has several threads to use."""

    def compute() -> tuple[float, float]:
        import numpy as np

        torch.set_num_threads(2)
        ones = torch.ones(500, 500, requires_grad=True)
        (ones @ ones).sum().backward()
        assert ones.grad is not None
        return ones.grad[0, 0].item(), float((np.ones((500, 500)) @ np.ones((500, 500)))[0, 0])

    assert trx.Launcher(workers_per_host=1).run(compute).rank(0) == (1000.0, 500.0)


def test_multiprocessing_pool_of_either_kind(launcher: trx.Launcher) -> None:
    def pool(method: str) -> list[int]:
        import multiprocessing

        with multiprocessing.get_context(method).Pool(2) as processes:
            return processes.map(abs, [-1, -2, -3])

    assert launcher.run(pool, "fork").rank(1) == [1, 2, 3]
    assert launcher.run(pool, "spawn").rank(1) == [1, 2, 3]
