"""Train a small model with DDP on two workers, with nccl if there are GPUs and gloo otherwise."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torchrunx_ray as trx


def train(steps: int) -> dict[str, torch.Tensor]:
    """Fit a line to noisy points; each worker has its own points."""
    rank = dist.get_rank()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(1, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    torch.manual_seed(rank)
    x = torch.rand(256, 1, device=device)
    y = 3 * x + 1 + 0.05 * torch.randn_like(x)
    for step in range(steps):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 5) == 0 and rank == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    return {name: value.cpu() for name, value in model.module.state_dict().items()}


if __name__ == "__main__":
    result = trx.launch(train, func_kwargs={"steps": 200}, hostnames=1, workers_per_host=2)
    first, second = result
    print(
        f"learned y = {first['weight'].item():.2f} x + {first['bias'].item():.2f} (truth: 3 x + 1)"
    )
    print("both ranks hold equal parameters:", all(first[k].equal(second[k]) for k in first))
