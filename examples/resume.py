"""Train with DDP on one to three hosts, and go on after the loss of workers and hosts.

The function saves a checkpoint every 20 steps, and when the run is about to change its hosts. If you press Ctrl-C, the
steps since the last checkpoint are lost. Every attempt resumes from the last checkpoint, with as many workers as there
are. All workers together see the same batch in each step, however many they are, so the result does not depend on
what was lost on the way.

    python examples/resume.py checkpoint.pt

Start it again to continue. If the checkpoint has all steps already, the second run ends at once.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torchrunx_ray as trx

BATCH = 96
"""Number of samples per step, over all workers."""


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the whole batch of a step, which depends on nothing but the step."""
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    return x, x.sum(dim=1, keepdim=True).sin()


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint. A kill at any moment leaves a whole file, the old one or the new one."""
    unfinished = path.with_name(f"{path.name}.{trx.context().attempt}")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def should_stop() -> bool:
    """Return True on all ranks if any rank has been asked to stop."""
    asked = torch.tensor(int(trx.context().stop_asked is not None))
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked)


def train(path: Path, steps: int) -> float:
    """Train until `steps`, or until asked to stop. Return the loss on a batch that the model has not seen."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
    model = DistributedDataParallel(torch.nn.Sequential(*layers))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step = 0
    if path.exists():
        state = torch.load(path)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < steps and not should_stop():
        x, y = batch_of(step)
        predicted = model(x[rank::world_size])
        # DDP divides the sum of the gradients by the number of workers, whose parts may differ in size.
        squares = torch.nn.functional.mse_loss(predicted, y[rank::world_size], reduction="sum")
        optimizer.zero_grad()
        (squares * world_size / BATCH).backward()
        optimizer.step()
        step += 1
        if rank == 0 and step % 20 == 0:
            save_all(path, step, model, optimizer)
    if rank == 0:
        save_all(path, step, model, optimizer)
    x, y = batch_of(-1)
    with torch.no_grad():
        return torch.nn.functional.mse_loss(model.module(x), y).item()


def save_all(
    path: Path, step: int, model: DistributedDataParallel, optimizer: torch.optim.Optimizer
) -> None:
    model_state, optimizer_state = model.module.state_dict(), optimizer.state_dict()
    save(path, {"step": step, "model": model_state, "optimizer": optimizer_state})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="checkpoint, on a disk that all hosts share")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    result = trx.launch(
        train,
        (arguments.path.absolute(), arguments.steps),
        hostnames=(1, 3),  # as many as there are now; a lost host does not end the run
        workers_per_host=1,
        backend="gloo",
        max_restarts=10,
    )
    for attempt in result.attempts:
        print(f"attempt {attempt.number}: {attempt.world_size} workers, {attempt.why}")
    print(f"final loss {result.rank(0):.6f}")
