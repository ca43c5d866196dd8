"""The entrypoint of a WorkerSpec of torch's elastic agent, as the function of a worker."""

from collections.abc import Callable, Sequence
from string import Template
from typing import Any

from torchrunx_ray.worker.function import context, program


def run(
    entrypoint: Callable[..., Any] | str,
    args: Sequence[Any],
    drivers_interpreter: str,
    numa_options: Any,
) -> Any:
    """Call the function, or become the program. `${local_rank}` in an argument stands for the worker's local rank."""
    local_rank = context.context().local_rank  # LOCAL_RANK may be virtual
    filled = [
        Template(arg).safe_substitute(local_rank=local_rank) if isinstance(arg, str) else arg
        for arg in args
    ]
    if not isinstance(entrypoint, str):
        return _bound(entrypoint, numa_options)(*filled)
    is_python = entrypoint == drivers_interpreter
    path = program.interpreter(entrypoint) if is_python else entrypoint
    return _bound(program.become, numa_options)([path, *map(str, filled)])


def _bound(func: Callable[..., Any], numa_options: Any) -> Callable[..., Any]:
    """Return the function with the binding to the CPUs near the worker's GPU, which a program inherits."""
    if numa_options is None:
        return func
    from torch.numa import binding

    wrap: Any = vars(binding)["_maybe_wrap_with_numa_binding"]  # it has no public name
    gpu_index = context.context().local_rank
    return wrap(func, gpu_index=gpu_index, numa_options=numa_options)
