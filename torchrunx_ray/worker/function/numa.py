"""Binding of a worker to the CPUs near its GPU, by torch."""

from collections.abc import Callable
from typing import Any

from torchrunx_ray.worker.function import context


def bound(func: Callable[..., Any], numa_options: Any) -> Callable[..., Any]:
    """Return the function with the binding to the CPUs near the worker's GPU, which a program inherits."""
    if numa_options is None:
        return func
    from torch.numa import binding

    wrap: Any = vars(binding)["_maybe_wrap_with_numa_binding"]  # it has no public name
    gpu_index = context.context().local_rank
    return wrap(func, gpu_index=gpu_index, numa_options=numa_options)


def options(mode: str | None) -> Any:
    """Return torch's options for a binding of this name; None for no binding."""
    if mode is None:
        return None
    from torch.numa.binding import AffinityMode, NumaOptions

    return NumaOptions(affinity_mode=AffinityMode(mode))
