"""DeepSpeed's ZeRO: optimizer state and gradients are sharded among the workers."""

import deepspeed
import torch
import torch.distributed as dist

import torchrunx_ray as trx


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return x, x.prod(dim=1, keepdim=True)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))


def train(steps: int, stage: int) -> list[float]:
    """Return the losses over all workers."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    x, y = make_data()
    model = make_model()
    engine, *_ = deepspeed.initialize(  # uses the existing process group
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        config={
            "train_batch_size": len(x),
            "gradient_clipping": 1.0,  # DeepSpeed's default
            "zero_optimization": {"stage": stage},
        },
    )
    x, y = x[rank::workers].to(engine.device), y[rank::workers].to(engine.device)
    losses: list[float] = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        over_all = loss.detach() / workers
        dist.all_reduce(over_all)
        losses.append(over_all.item())
    return losses


if __name__ == "__main__":
    result = trx.launch(train, (10, 2), hostnames=1, workers_per_host=2)
    for step, loss in enumerate(result.rank(0)):
        print(f"step {step}  loss {loss:.6f}")
