"""DDP with a dataset split among the workers: the losses equal those of one process with the whole batch."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchrunx_ray as trx


def make_dataset() -> TensorDataset:
    """Return points in a plane, labelled 1 if they lie inside a ring."""
    points = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    radius = points.norm(dim=1, keepdim=True)
    return TensorDataset(points, ((radius > 0.7) & (radius < 1.5)).float())


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def train(epochs: int, batch_size: int) -> list[float]:
    """Return the mean loss of each epoch, over all workers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = dist.get_world_size()
    dataset = make_dataset()
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size // workers, sampler=sampler)
    model = DistributedDataParallel(make_model().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    losses: list[float] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for points, within in loader:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                model(points.to(device)), within.to(device)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / len(loader) / workers)
    return losses


if __name__ == "__main__":
    # The same as `torchrun --nproc-per-node=2`:
    result = trx.launch(
        train, func_kwargs={"epochs": 8, "batch_size": 32}, hostnames=1, workers_per_host=2
    )
    for epoch, loss in enumerate(result.rank(0)):
        print(f"epoch {epoch}  loss {loss:.6f}")
