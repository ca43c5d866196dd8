"""A data-parallel training whose parameters are equal to the last bit, whatever the number of workers.

Each step has the same number of micro-batches. Every rank computes some of them, and adds up the gradients of all in the
order of the micro-batches.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import torchrunx_ray as trx
from tests.processes import above, note, own_mark

_MICRO_BATCHES = 12
_SAMPLES = 16
_INPUTS, _HIDDEN = 8, 16
_SIZE = (_INPUTS + 1) * _HIDDEN

_SAVE_EVERY = 10


@dataclass(frozen=True)
class Seen:
    """A rank of an attempt that has begun its function, with the processes above its worker."""

    attempt: int
    rank: int
    world_size: int
    pid: int
    mark: str
    above: dict[str, int]


@dataclass
class State:
    """Everything that a step changes."""

    step: int
    weights: torch.Tensor
    velocity: torch.Tensor

    @classmethod
    def first(cls) -> "State":
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(_SIZE, generator=generator, dtype=torch.float64)
        return cls(0, weights, torch.zeros(_SIZE, dtype=torch.float64))

    def update(self, gradients: torch.Tensor) -> None:
        """Take a step, given the gradient of each micro-batch, in order."""
        total = torch.zeros(_SIZE, dtype=torch.float64)
        for gradient in gradients:
            total += gradient
        self.velocity = 0.9 * self.velocity + total / _MICRO_BATCHES
        self.weights = self.weights - 0.001 * self.velocity
        self.step += 1

    @property
    def digest(self) -> str:
        both = torch.cat([self.weights, self.velocity]).numpy().tobytes()
        return hashlib.sha256(both).hexdigest()[:16]


def gradient_of(step: int, micro_batch: int, weights: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * _MICRO_BATCHES + micro_batch)
    x = torch.randn(_SAMPLES, _INPUTS, generator=generator, dtype=torch.float64)
    leaf = weights.detach().requires_grad_()
    first = leaf[: _INPUTS * _HIDDEN].view(_INPUTS, _HIDDEN)
    predicted = (x @ first).tanh() @ leaf[_INPUTS * _HIDDEN :]
    loss = (predicted - x.sum(dim=1).sin()).square().mean()
    return torch.autograd.grad(loss, leaf)[0]


def train_alone(steps: int) -> str:
    """Return the digest after so many steps in this process."""
    torch.set_num_threads(1)
    state = State.first()
    for step in range(steps):
        each = [gradient_of(step, i, state.weights) for i in range(_MICRO_BATCHES)]
        state.update(torch.stack(each))
    return state.digest


def train(folder: Path, pause_s: float) -> tuple[int, str]:
    """Train until there is a file "enough", or until asked to stop. Return the last step and the digest."""
    torch.set_num_threads(1)
    announce(folder)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    path = folder / "checkpoint"
    state = State(**torch.load(path)) if path.exists() else State.first()
    journal = os.open(folder / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        signs = (trx.context().stop_asked is not None, (folder / "enough").exists())
        ends = torch.tensor(signs, dtype=torch.int32)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if rank == 0 and (ends.any() or state.step % _SAVE_EVERY == 0):
            save(path, state)
        if ends.any():
            return state.step, state.digest
        state.update(all_gradients(state, rank, world_size))
        line = f"{trx.context().attempt} {rank} {state.step} {state.digest} {time.time()}\n"
        os.write(journal, line.encode())
        time.sleep(pause_s)


def announce(folder: Path) -> None:
    context = trx.context()
    seen = Seen(
        context.attempt,
        context.rank,
        context.world_size,
        os.getpid(),
        own_mark(),
        above(os.getpid()),
    )
    note(folder / "ranks" / f"{seen.attempt}.{seen.rank}", json.dumps(asdict(seen)))


def all_gradients(state: State, rank: int, world_size: int) -> torch.Tensor:
    """Return the gradients of all micro-batches, in order, each computed by one rank."""
    share = -(-_MICRO_BATCHES // world_size)
    mine = torch.zeros(share, _SIZE, dtype=torch.float64)
    for i, micro_batch in enumerate(range(rank, _MICRO_BATCHES, world_size)):
        mine[i] = gradient_of(state.step, micro_batch, state.weights)
    of_ranks = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(of_ranks, mine)
    each = [of_ranks[i % world_size][i // world_size] for i in range(_MICRO_BATCHES)]
    return torch.stack(each)


def save(path: Path, state: State) -> None:
    unfinished = path.with_name(f"{path.name}.{trx.context().attempt}")
    with unfinished.open("wb") as file:
        torch.save(vars(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
