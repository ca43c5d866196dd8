"""A PyTorch Lightning Trainer whose processes are the workers of the launch."""

import os

import lightning as L  # noqa: N812  # the usual name
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchrunx_ray as trx
from torchrunx_ray.integrations.lightning import TorchrunxClusterEnvironment


def make_dataset() -> TensorDataset:
    x = torch.linspace(-1, 1, 128).unsqueeze(1)
    return TensorDataset(x, (3 * x).sin())


def make_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


class Sine(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def training_step(self, batch: list[torch.Tensor], _batch_index: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.network(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(epochs: int, batch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the last epoch's mean loss over all workers, and the parameters."""
    trainer = L.Trainer(
        plugins=[TorchrunxClusterEnvironment()],  # Lightning uses the workers and starts none
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        strategy="ddp",
        accelerator="auto",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Sine()
    loader = DataLoader(make_dataset(), batch_size // trainer.world_size)
    trainer.fit(model, loader)
    return trainer.callback_metrics["loss"].item(), model.cpu().state_dict()


if __name__ == "__main__":
    result = trx.launch(
        train,
        func_kwargs={"epochs": 20, "batch_size": 32},
        hostnames=1,
        workers_per_host=2,
        preload=("torch", "torch.distributed", "lightning"),  # imported once per host
    )
    (loss, first), (_, second) = result
    print(f"loss {loss:.6f}")
    print("both ranks hold equal parameters:", all(first[k].equal(second[k]) for k in first))
