"""FSDP2: train on two workers, save a distributed checkpoint, and continue from it with three workers."""

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchrunx_ray as trx


def make_sharded() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer; each worker holds a part of every parameter."""
    mesh = init_device_mesh(
        "cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),)
    )
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Tanh()) for _ in range(3)]
    model = torch.nn.Sequential(*blocks, torch.nn.Linear(10, 1)).to(mesh.device_type)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def fit(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train on this worker's part of the batch. Return the loss over all workers before each step and at the end."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    device = next(model.parameters()).device
    x = torch.randn(96, 10, generator=torch.Generator().manual_seed(1)).to(device)
    y = x.sum(dim=1, keepdim=True).sin()
    losses: list[float] = []
    for _ in range(steps + 1):
        loss = torch.nn.functional.mse_loss(model(x[rank::workers]), y[rank::workers])
        over_all = loss.detach() / workers
        dist.all_reduce(over_all)
        losses.append(over_all.item())
        if len(losses) <= steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return the full parameters and optimizer state on rank 0, in CPU memory."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=options)


def train_and_save(checkpoint: str, steps: int) -> tuple[list[float], Any]:
    model, optimizer = make_sharded()
    losses = fit(model, optimizer, steps)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoint)
    return losses, whole(model, optimizer)


def load_and_go_on(checkpoint: str, steps: int) -> tuple[list[float], Any]:
    model, optimizer = make_sharded()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=checkpoint)  # each worker reads its new parts
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    loaded = copy.deepcopy(
        whole(model, optimizer)
    )  # a copy, since training continues to change the optimizer's state
    return fit(model, optimizer, steps), loaded


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


if __name__ == "__main__":
    # With several hosts, each must see the same directory.
    with tempfile.TemporaryDirectory() as checkpoint:
        saved = trx.launch(train_and_save, (checkpoint, 30), hostnames=1, workers_per_host=2)
        loaded = trx.launch(load_and_go_on, (checkpoint, 30), hostnames=1, workers_per_host=3)
    (losses, (model, optimizer)), (more_losses, (model_again, optimizer_again)) = (
        saved.rank(0),
        loaded.rank(0),
    )
    print(f"2 workers: loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    print(f"3 workers: loss {more_losses[0]:.6f} -> {more_losses[-1]:.6f}")
    print("parameters equal:", equal(model, model_again))
    print("optimizer state equal:", equal(optimizer, optimizer_again))
