"""DataLoaders with worker processes: each sample is read exactly once per epoch."""

import os

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import torchrunx_ray as trx

SAMPLES = 100


class Numbers(Dataset[tuple[int, int]]):
    """A dataset that returns each index with the pid of the process that read it."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def read(epochs: int, processes: int) -> list[tuple[list[int], set[int]]]:
    """Return the samples that this worker got in each epoch, and the pids of the processes that read them."""
    dataset = Numbers()
    sampler = DistributedSampler(dataset)
    loader = DataLoader(
        dataset,
        batch_size=5,
        sampler=sampler,
        num_workers=processes,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )
    seen: list[tuple[list[int], set[int]]] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches = [(indices.tolist(), pids.tolist()) for indices, pids in loader]
        indices = [index for batch, _ in batches for index in batch]
        seen.append((indices, {pid for _, batch in batches for pid in batch}))
    return seen


if __name__ == "__main__":
    result = trx.launch(
        read, func_kwargs={"epochs": 2, "processes": 2}, hostnames=1, workers_per_host=2
    )
    for epoch, of_ranks in enumerate(zip(*result, strict=True)):
        read_by = [len(indices) for indices, _ in of_ranks]
        processes = set.union(*(pids for _, pids in of_ranks))
        every = sorted(index for indices, _ in of_ranks for index in indices)
        print(
            f"epoch {epoch}: {read_by} samples, read by {len(processes)} processes;",
            "each sample once:",
            every == list(range(SAMPLES)),
        )
