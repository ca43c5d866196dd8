"""Environment variables that are copied to hosts, and the environment of a template."""

import fnmatch
import os
from collections.abc import Iterable, Mapping

from torchrunx_ray.wire.ranks import RANK_VARIABLES

DEFAULT_ENV_VARS = (
    "PATH",
    "LD_LIBRARY*",
    "LIBRARY_PATH",
    "PYTHON*",
    "CUDA*",
    "TORCH*",
    "PYTORCH*",
    "NCCL*",
    "GLOO*",
    "OMP*",
    "HF_*",
)

MARK = "TORCHRUNX_RAY_POOL"
"""Variable in the environment of all processes that one agent started, by which leftovers are found."""

TIMER_ENABLED = "TORCHELASTIC_ENABLE_FILE_TIMER"
"""Variable with which torch's users ask for a watchdog, by the value 1."""

TIMER_FILE = "TORCHELASTIC_TIMER_FILE"
"""Variable with the path of the watchdog's FIFO, also if the user has chosen the path."""

HEALTH_PORT = "TORCHELASTIC_HEALTH_CHECK_PORT"
"""Variable with the port of the agents' health checks."""

_OF_ONE_LAUNCH = (TIMER_FILE, HEALTH_PORT)
"""Variables that a launch inside a worker does not inherit: the outer launch uses the FIFO and the port."""

_TORCHRUNS_OWN = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE")
"""Variables of a driver that torchrun started. Workers must not use torchrun's store or its error file."""

_NEVER_COPIED = (
    "CUDA_VISIBLE_DEVICES", "RAY_*", MARK, *_TORCHRUNS_OWN, *sorted(RANK_VARIABLES)
)  # fmt: skip

_DRIVERS_OWN = ("TORCHRUNX_LOG_DIR", "TORCHRUNX_LOG_LEVEL")
"""Variables that only the driver reads. They are copied only if requested by their full name."""

_SAME_INTERPRETER_ONLY = ("PATH", "LD_LIBRARY*", "LIBRARY_PATH", "PYTHON*")
"""Variables that are copied only to hosts with the driver's interpreter: a laptop's paths break a container."""

_RAY_FOR_DRIVERS = ("RAY_AUTH_*", "RAY_USAGE_*")
"""Variables that Ray gives the agent and that `ray.init()` in the function needs as well."""

_RAY_FOR_ITS_WORKERS = ("RAY_*", "SPT_NOENV", "PYTHONBREAKPOINT", "OMP_NUM_THREADS")
"""Variables that Ray sets for its own worker processes, and that their children must not inherit.

Ray derives OMP_NUM_THREADS from the agent's number of CPUs. An agent has none, so the variable would allow one
thread on a whole host.
"""


def forbidden(name: str) -> bool:
    """Return True for a variable that the user may not set or copy."""
    return _matches(name, _NEVER_COPIED)


def chosen(environment: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """Return the driver's variables that are copied to hosts."""
    patterns = tuple(patterns)
    is_in_worker = "TORCHELASTIC_RUN_ID" in environment
    hidden = (*_DRIVERS_OWN, *_OF_ONE_LAUNCH) if is_in_worker else _DRIVERS_OWN
    return {
        name: value
        for name, value in environment.items()
        if _matches(name, patterns)
        and not forbidden(name)
        and not _is_rays_debugger(name, value)
        and (name in patterns or name not in hidden)
    }


def too_large(environment: Mapping[str, str]) -> str | None:
    """Describe a variable that is too large to start any process; return None if all are small enough."""
    limit = 32 * os.sysconf("SC_PAGE_SIZE")  # MAX_ARG_STRLEN of the kernel
    for name, value in environment.items():
        size = len(os.fsencode(f"{name}={value}")) + 1
        if size > limit:
            return (
                f"{name} has {size} bytes, and Linux starts no process with a variable of more than "
                f"{limit} bytes, name included. Pass the value as an argument of the function, or in a file."
            )
    return None


def too_large_together(environment: Mapping[str, str]) -> str:
    """Describe the total size of the variables and name the largest ones."""
    sizes = {name: len(os.fsencode(f"{name}={value}")) + 1 for name, value in environment.items()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    named = ", ".join(f"{name} ({sizes[name]})" for name in largest)
    return (
        f"all variables together have {sum(sizes.values())} bytes, and Linux starts no process with so many. "
        f"The largest are {named}. Pass such values as arguments of the function, or in a file."
    )


def for_template(
    agents_own: Mapping[str, str], from_driver: Mapping[str, str], *, same_interpreter: bool
) -> dict[str, str]:
    """Return the environment of a host's template, before env_file and explicit values."""
    environment = {
        name: value
        for name, value in agents_own.items()
        if _matches(name, _RAY_FOR_DRIVERS) or not _matches(name, _RAY_FOR_ITS_WORKERS)
    }
    return environment | {
        name: value
        for name, value in from_driver.items()
        if same_interpreter or not _matches(name, _SAME_INTERPRETER_ONLY)
    }


def _is_rays_debugger(name: str, value: str) -> bool:
    # ray.init sets this value in the driver. With it, breakpoint() in a worker would import ray.
    return name == "PYTHONBREAKPOINT" and value.startswith("ray.")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
