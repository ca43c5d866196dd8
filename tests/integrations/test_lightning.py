"""Lightning's Trainer and Fabric take the workers of a launch for their processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torchrunx_ray as trx

_PRELOAD = ("torch", "torch.distributed", "lightning", "pytorch_lightning")


@pytest.fixture
def launcher(cluster: None) -> trx.Launcher:
    return trx.Launcher(hostnames=1, workers_per_host=2, preload=_PRELOAD)


def test_trainer_has_the_loss_of_one_process_with_the_whole_batch(
    run_example: Callable[[str], list[str]], load_example: Callable[[str], ModuleType]
) -> None:
    loss, equal = run_example("lightning_trainer")[-2:]

    example = load_example("lightning_trainer")
    network = example.make_network()
    x, y = example.make_dataset().tensors
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = [0.0]
    for epoch in range(20):
        losses.clear()
        order = torch.randperm(128, generator=torch.Generator().manual_seed(epoch))  # Lightning's
        for batch in order.split(32):
            step_loss = torch.nn.functional.mse_loss(network(x[batch]), y[batch])
            optimizer.zero_grad()
            step_loss.backward()
            optimizer.step()
            losses.append(step_loss.item())
    assert float(loss.split()[1]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert equal == "both ranks hold equal parameters: True"


def fit(package: str, devices: int = 2) -> tuple[bool, list[str], float]:
    """Train a little with `lightning` or `pytorch_lightning`; the group must be there afterwards."""
    import importlib
    import os
    import sys
    import tempfile
    import warnings

    import torch
    import torch.distributed as dist

    if package == "pytorch_lightning":
        sys.modules["lightning"] = None  # type: ignore[assignment]  # as if it were not installed
    from torchrunx_ray.integrations.lightning import TorchrunxClusterEnvironment

    environment = TorchrunxClusterEnvironment()
    pl = importlib.import_module(package)

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
            return (self.layer(batch) - batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    warnings.simplefilter("ignore")  # about how few workers its loader has, and the like
    trainer = pl.Trainer(
        plugins=[environment],
        devices=devices,
        num_nodes=1,
        strategy="ddp",
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder[0],
    )
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(8, 1), 2))
    total = torch.tensor(float(os.environ["RANK"]) + 1)
    dist.all_reduce(total)
    files = [file for _, _, files in os.walk(folder[0]) for file in files]
    return trainer.is_global_zero, files, total.item()


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_trainer_of_either_package_saves_once_and_leaves_the_group(
    launcher: trx.Launcher, package: str
) -> None:
    result = launcher.run(fit, package)

    assert list(result) == [
        (True, ["epoch=0-step=2.ckpt"], 3.0),
        (False, ["epoch=0-step=2.ckpt"], 3.0),
    ]


def test_other_numbers_than_the_launchs_are_refused_with_those_to_pass(
    launcher: trx.Launcher,
) -> None:
    with pytest.raises(ValueError, match="devices=2, num_nodes=1") as caught:
        launcher.run(fit, "lightning", devices=3)

    assert "devices=3, num_nodes=1 make 3 processes, but this launch has 2" in str(caught.value)


def test_rank_zero_is_told_although_lightning_was_imported_before_there_were_ranks(
    launcher: trx.Launcher,
) -> None:
    def who_speaks() -> int:
        from lightning.pytorch.utilities import rank_zero_only

        from torchrunx_ray.integrations.lightning import TorchrunxClusterEnvironment

        TorchrunxClusterEnvironment()
        return rank_zero_only.rank

    assert list(launcher.run(who_speaks)) == [0, 1]


def test_fabric_takes_the_environment_as_well(launcher: trx.Launcher) -> None:
    def total() -> tuple[int, float]:
        import torch
        from lightning import Fabric

        from torchrunx_ray.integrations.lightning import TorchrunxClusterEnvironment

        environment = TorchrunxClusterEnvironment()
        fabric = Fabric(plugins=[environment], devices=2, strategy="ddp", accelerator="cpu")
        fabric.launch()
        mean = fabric.all_reduce(torch.tensor(float(fabric.global_rank)), reduce_op="sum")
        return fabric.world_size, float(mean)

    assert list(launcher.run(total)) == [(2, 1.0)] * 2


def test_outside_of_a_launch_it_says_where_it_belongs() -> None:
    from torchrunx_ray.integrations.lightning import TorchrunxClusterEnvironment

    with pytest.raises(RuntimeError, match="in the function that torchrunx_ray launches"):
        TorchrunxClusterEnvironment()


def test_without_lightning_it_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['lightning'] = sys.modules['lightning_fabric'] = None\n"
        "import torchrunx_ray.integrations.lightning"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "ImportError: torchrunx_ray.integrations.lightning needs lightning or" in done.stderr
    assert "pip install lightning" in done.stderr
