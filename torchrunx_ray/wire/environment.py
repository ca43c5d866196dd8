"""Environment variables that travel, and the environment of a template."""

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
"""Stands in the environment of everything that one agent started, for finding what is left."""

_TORCHRUNS_OWN = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE")
"""Variables of a driver that torchrun started: its store and its file are none of the workers'."""

_NEVER_COPIED = (
    "CUDA_VISIBLE_DEVICES", "RAY_*", MARK, *_TORCHRUNS_OWN, *sorted(RANK_VARIABLES)
)  # fmt: skip

_DRIVERS_OWN = ("TORCHRUNX_LOG_DIR", "TORCHRUNX_LOG_LEVEL")
"""Only the driver reads these. They travel when they are asked for by name."""

_SAME_INTERPRETER_ONLY = ("PATH", "LD_LIBRARY*", "LIBRARY_PATH", "PYTHON*")
"""A laptop's paths break a container: these go only where the driver's interpreter is too."""

_RAY_FOR_DRIVERS = ("RAY_AUTH_*", "RAY_USAGE_*")
"""Ray's variables for the agent that a function's own `ray.init()` needs as well."""

_RAY_FOR_ITS_WORKERS = ("RAY_*", "SPT_NOENV", "PYTHONBREAKPOINT", "OMP_NUM_THREADS")
"""Variables that Ray sets for its own worker processes, and children would inherit.

OMP_NUM_THREADS would be the agent's number of CPUs, which is none: one thread for a whole host.
"""


def forbidden(name: str) -> bool:
    """Return True if the launch sets this variable itself, so that nobody may ask for it."""
    return _matches(name, _NEVER_COPIED)


def chosen(environment: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """The driver's variables that travel."""
    patterns = tuple(patterns)
    return {
        name: value
        for name, value in environment.items()
        if _matches(name, patterns)
        and not forbidden(name)
        and not _is_rays_debugger(name, value)
        and (name in patterns or name not in _DRIVERS_OWN)
    }


def too_large(environment: Mapping[str, str]) -> str | None:
    """Name a variable that Linux lets no process start with; None if all are small enough."""
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
    """Say how large the variables are, and name the largest ones."""
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
    """The environment of a host's template, before env_file and explicit values."""
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
    # ray.init sets it in the driver, and breakpoint() in a worker would import ray.
    return name == "PYTHONBREAKPOINT" and value.startswith("ray.")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
