"""The options of a launch."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torchrunx_ray.driver.checks import check_options
from torchrunx_ray.wire.environment import DEFAULT_ENV_VARS
from torchrunx_ray.wire.messages import StartMethod

LogHandlers = Sequence[logging.Handler] | Literal["auto"] | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to launch. A wrong value is a ValueError or TypeError that names the option."""

    hostnames: int | Sequence[str] | Literal["auto", "slurm"] = "auto"
    """Where to launch: every node that can hold workers ("auto"), that many nodes, these nodes (name, IP, node id, "localhost" for the driver's), or those of the Slurm allocation ("slurm")."""
    workers_per_host: int | Sequence[int] | Literal["auto", "gpu", "cpu", "slurm"] = "auto"
    """Workers on each host: a number, one number per host, one per GPU, one per CPU, or as the Slurm allocation has GPUs, else CPUs ("slurm"). "auto" is "gpu" if any chosen host has GPUs, else "cpu"."""
    gpus_per_worker: float | None = None
    """GPUs that each worker pins. None: 1 if every chosen host has as many GPUs as workers, else 0."""
    cpus_per_worker: float | None = None
    """CPUs that each worker reserves. None: 1, or less where a host has fewer CPUs than workers."""
    accelerator_type: str | None = None
    """Of the hosts' GPUs, in Ray's words, such as "A100"."""
    label_selector: Mapping[str, str] | None = None
    """Ray's labels that every host must have, such as {"region": "in(us, eu)"}."""
    resources_per_host: Mapping[str, float] | None = None
    """Further Ray resources to reserve on each host."""
    placement_strategy: Literal["STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK"] = "STRICT_SPREAD"
    """Ray's placement strategy for the hosts' bundles."""
    backend: str | None = "auto"
    """Of the process group: "nccl", "gloo", "mpi", "ucc", "cpu:gloo,cuda:nccl". "auto": nccl where workers have GPUs, else gloo. None: no process group."""
    timeout: float = 600
    """Timeout of the process group, in seconds."""
    placement_timeout: float | None = 600
    """How long to wait for room in the cluster, in seconds; None for ever."""
    shutdown_timeout: float = 5
    """From SIGTERM to SIGKILL for workers that must stop, in seconds."""
    linger: float = 60
    """How long agents stay warm after a run, holding no resources, in seconds."""
    default_env_vars: Sequence[str] = DEFAULT_ENV_VARS
    """Patterns of the driver's environment variables that travel to workers."""
    extra_env_vars: Sequence[str] | Mapping[str, str] = ()
    """More of them: patterns, NAME=value strings, or a mapping."""
    env_file: str | os.PathLike[str] | None = None
    """A file on each host that bash sources for the workers' environment."""
    log_handlers: LogHandlers | Callable[[], LogHandlers] = "auto"
    """Who takes the workers' output: files and the driver's console or loggers ("auto"), nobody (None), or exactly these handlers; also as a function that returns one of these, called for each launch."""
    console_ranks: Sequence[int] | Literal["all"] = (0,)
    """Whose output "auto" brings to the driver."""
    progress: bool | None = None
    """Show how far a run is. None: on a terminal, in a notebook and in a job's log."""
    preload: Sequence[str] = ("torch", "torch.distributed")
    """Modules that are imported once per host, before workers are forked."""
    start_method: StartMethod = "fork"
    """"fork" workers from the host's template, or "spawn" fresh interpreters."""
    runtime_env: Mapping[str, Any] | None = None
    """Ray's runtime environment, for the agents."""
    name: str | None = None
    """Of the run, in logs, errors and the dashboard. None: the function's name."""

    def __post_init__(self) -> None:
        """Check everything that can be checked before anything starts."""
        check_options({f.name: getattr(self, f.name) for f in fields(Options)})

    def explicit_variables(self) -> dict[str, str]:
        """Those of `extra_env_vars` that have a value."""
        if isinstance(self.extra_env_vars, Mapping):
            return dict(self.extra_env_vars)
        pairs = (entry.partition("=") for entry in self.extra_env_vars if "=" in entry)
        return {name: value for name, _, value in pairs}

    def variable_patterns(self) -> list[str]:
        """Which of the driver's variables travel."""
        patterns = list(self.default_env_vars)
        if not isinstance(self.extra_env_vars, Mapping):
            patterns += [entry for entry in self.extra_env_vars if "=" not in entry]
        return patterns
