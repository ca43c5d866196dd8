"""Which GPUs a worker sees, and which of them is its own."""

from collections.abc import Sequence

from torchrunx_ray.wire.ranks import first_gpu


def of_worker(
    gpu_ids: Sequence[str], gpus_per_worker: float, local_rank: int
) -> tuple[str, int | None]:
    """CUDA_VISIBLE_DEVICES, and the index of the worker's first device in it.

    A worker sees all GPUs that the launch holds on its host, as under torchrun; of MIG instances
    only its own, since CUDA shows one of them to a process. Without GPUs it sees none.
    """
    if not gpu_ids:
        return "", None
    first = first_gpu(gpus_per_worker, local_rank)
    if any(gpu_id.startswith("MIG-") for gpu_id in gpu_ids):
        return gpu_ids[first], 0
    return ",".join(gpu_ids), first
