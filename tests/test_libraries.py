"""What a function does with torch and its like works in a forked worker as in a plain process."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from numpy.random import RandomState
from torch.utils.data import DataLoader

import torchrunx_ray as trx
from tests.processes import wait_until
from tests.scripts import run_alone
from torchrunx_ray.wire.messages import StartMethod


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
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


def test_ddp_model_that_is_returned_is_told_what_to_return(launcher: trx.Launcher) -> None:
    def make() -> torch.nn.Module:
        return torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))

    result = launcher.run(make)
    with pytest.raises(trx.PayloadError, match="process group has not been initialized") as caught:
        result.rank(0)
    assert str(caught.value).endswith("Return model.module or its state_dict() instead.")


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.exhaustive
def test_torch_compile(launcher: trx.Launcher, tmp_path: Path) -> None:
    """On one rank: it takes 20 s of CPU."""

    def compile_and_call() -> float:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
        return torch.compile(lambda x: (x.sin() + 1).sum())(torch.zeros(1000)).item()

    launcher = dataclasses.replace(launcher, workers_per_host=1)
    assert launcher.run(compile_and_call).rank(0) == 1000.0


@pytest.mark.slow
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


@pytest.mark.slow
def test_multiprocessing_pool_of_either_kind(launcher: trx.Launcher) -> None:
    def pool(method: str) -> list[int]:
        import multiprocessing

        with multiprocessing.get_context(method).Pool(2) as processes:
            return processes.map(abs, [-1, -2, -3])

    assert launcher.run(pool, "fork").rank(1) == [1, 2, 3]
    assert launcher.run(pool, "spawn").rank(1) == [1, 2, 3]


@pytest.mark.slow
def test_unseeded_random_numbers_differ_between_ranks_and_runs(cluster: None) -> None:
    """Generators made by an import in the template were the same in every fork of it."""

    def draw() -> tuple[float, float, float]:
        import random

        import numpy as np
        import torch

        return random.random(), float(np.random.rand()), float(torch.rand(1))

    launcher = trx.Launcher(workers_per_host=2, preload=("torch", "numpy.random"))
    drawn = [*launcher.run(draw), *launcher.run(draw)]

    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [4, 4, 4]


@pytest.mark.slow
def test_numbers_that_a_preloaded_module_seeded_stay_the_same(joined: None, tmp_path: Path) -> None:
    (tmp_path / "seeds.py").write_text(
        "import numpy as np, torch; np.random.seed(7); torch.manual_seed(7)"
    )
    script = """
import numpy as np
import torch
import torchrunx_ray as trx

def draw():
    return np.random.rand().hex(), torch.rand(1).item()

print(list(trx.launch(draw, workers_per_host=2, preload=("torch", "seeds"))))
"""
    done = run_alone(script, tmp_path)

    drawn = RandomState(7).rand().hex(), torch.rand(1, generator=torch.manual_seed(7)).item()
    assert done.stdout == f"{[drawn] * 2}\n", done.stderr


@pytest.mark.slow
def test_shared_memory_with_names_is_gone_after_a_run(launcher: trx.Launcher) -> None:
    """torch's own process that takes the names away was killed before it could."""

    def named() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith("torch_")}

    def share(how: str) -> None:
        torch.multiprocessing.set_sharing_strategy("file_system")
        vars(torch)["kept"] = torch.ones(1000).share_memory_()
        data = DataLoader(torch.ones(64, 8), batch_size=2, num_workers=2)
        next(iter(data))
        if how == "raises":
            raise ValueError
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)

    before = named()
    launcher.run(share, "returns")
    with pytest.raises(ValueError):  # noqa: PT011
        launcher.run(share, "raises")
    with pytest.raises(trx.WorkerFailedError):
        launcher.run(share, "is killed")
    assert wait_until(lambda: named() <= before), named() - before
