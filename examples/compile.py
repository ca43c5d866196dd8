"""torch.compile with a DDP model: the compiled model trains like the eager model."""

import shutil

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # the usual name
from torch.nn.parallel import DistributedDataParallel

import torchrunx_ray as trx


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(4, 32), torch.nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.gelu(self.hidden(x)))


def train(steps: int, backend: str | None) -> list[float]:
    """Return the losses over all workers. `backend` is torch.compile's backend; None trains without torch.compile."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Network().to(device))
    step_model = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).to(device)
    y = x.prod(dim=1, keepdim=True)
    losses: list[float] = []
    for _ in range(steps):
        loss = F.mse_loss(step_model(x[rank::workers]), y[rank::workers])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        over_all = loss.detach() / workers
        dist.all_reduce(over_all)
        losses.append(over_all.item())
    return losses


if __name__ == "__main__":
    # torch's default compiler, inductor, needs a C++ compiler.
    backend = "inductor" if shutil.which("c++") else "aot_eager"
    launcher = trx.Launcher(
        hostnames=1,
        workers_per_host=2,
        preload=("torch", "torch.distributed", "torch._dynamo"),  # imported once per host
    )
    eager, compiled = (launcher.run(train, 20, how).rank(0) for how in (None, backend))
    print("backend:", backend)
    for step in range(0, 20, 5):
        print(f"step {step:2d}  eager {eager[step]:.6f}  compiled {compiled[step]:.6f}")
    print("largest difference:", max(abs(a - b) for a, b in zip(eager, compiled, strict=True)))
