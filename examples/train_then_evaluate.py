"""Two functions in one script: train on all hosts, then evaluate the model on one worker.

The model goes directly from the training host to the evaluating host; the script has only a reference.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torchrunx_ray as trx


def points(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(256, 1, generator=generator)
    return x, 3 * x + 1


def train(steps: int) -> dict[str, torch.Tensor] | None:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = points(seed=dist.get_rank())
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.module.state_dict() if dist.get_rank() == 0 else None


def evaluate(weights: dict[str, torch.Tensor]) -> float:
    model = torch.nn.Linear(1, 1)
    model.load_state_dict(weights)
    x, y = points(seed=1000)
    return torch.nn.functional.mse_loss(model(x), y).item()


if __name__ == "__main__":
    trained = trx.launch(train, func_kwargs={"steps": 200}, workers_per_host=2, backend="gloo")
    evaluated = trx.launch(
        evaluate, func_args=(trained.ref(0),), hostnames=1, workers_per_host=1, backend="gloo"
    )
    print(f"mean squared error on points that the model has not seen: {evaluated.rank(0):.6f}")
