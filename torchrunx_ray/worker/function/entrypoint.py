"""The entrypoint of a WorkerSpec of torch's elastic agent, as the function of a worker."""

from collections.abc import Callable, Sequence
from string import Template
from typing import Any

from torchrunx_ray.worker.function import context, numa, program


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
        return numa.bound(entrypoint, numa_options)(*filled)
    is_python = entrypoint == drivers_interpreter
    path = program.interpreter(entrypoint) if is_python else entrypoint
    return numa.bound(program.become, numa_options)([path, *map(str, filled)])
