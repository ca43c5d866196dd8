"""GPUs that a worker sees, and the index of its own first GPU."""

from collections.abc import Sequence

from torchrunx_ray.wire.ranks import first_gpu


def of_worker(
    gpu_ids: Sequence[str], gpus_per_worker: float, local_rank: int
) -> tuple[str, int | None]:
    """Return CUDA_VISIBLE_DEVICES, and the index of the worker's first device in it.

    A worker sees all GPUs that the launch holds on its host, as under torchrun. With MIG, a worker sees only
    its own instance, since CUDA shows only one instance to a process. Without GPUs, a worker sees none.
    """
    if not gpu_ids:
        return "", None
    first = first_gpu(gpus_per_worker, local_rank)
    if any(gpu_id.startswith("MIG-") for gpu_id in gpu_ids):
        return gpu_ids[first], 0
    return ",".join(gpu_ids), first
