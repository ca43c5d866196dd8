"""The options of a launch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Annotated, Any, Literal, Self

from torchrunx_ray.driver.options import checks
from torchrunx_ray.driver.options.command_line import (
    amounts,
    hosts,
    integer,
    integer_or_none,
    number,
    number_or_none,
    pairs,
    ranks,
    string_or_none,
    variables,
    workers,
    written_as,
    written_as_json,
    written_as_words,
)
from torchrunx_ray.wire.environment import DEFAULT_ENV_VARS
from torchrunx_ray.wire.messages import StartMethod

LogHandlers = Sequence[logging.Handler] | Literal["auto"] | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a launch. A wrong value is a ValueError or TypeError that names the option."""

    hostnames: Annotated[
        int | tuple[int, int] | Sequence[str] | Literal["auto", "slurm"],
        written_as("hostnames", hosts),
    ] = "auto"
    """Hosts to launch on: every node that can hold workers ("auto"), that many nodes, from so many to so many nodes (MIN, MAX), these nodes (name, IP, node id, "localhost" for the driver's), or the nodes of the Slurm allocation ("slurm")."""
    workers_per_host: Annotated[
        int | Sequence[int] | Literal["auto", "gpu", "cpu", "slurm"],
        written_as("workers_per_host", workers),
    ] = "auto"
    """Workers on each host: a number, one number per host, one per GPU, one per CPU, or one per GPU of the Slurm allocation, else per CPU ("slurm"). "auto" is "gpu" if any chosen host has GPUs, else "cpu"."""
    gpus_per_worker: Annotated[float | None, written_as("gpus_per_worker", number_or_none)] = None
    """GPUs that each worker pins. None: 1 if every host already exists and has at least as many GPUs as workers, else 0 on all hosts; 0 with workers_per_host="cpu"."""
    cpus_per_worker: Annotated[float | None, written_as("cpus_per_worker", number_or_none)] = None
    """CPUs that each worker reserves. None: 1, or less if a host has fewer CPUs than workers."""
    accelerator_type: Annotated[str | None, written_as("accelerator_type", string_or_none)] = None
    """Ray's name for the type of the hosts' GPUs, such as "A100"."""
    label_selector: Annotated[Mapping[str, str] | None, written_as("label_selector", pairs)] = None
    """Ray labels that every host must have, each with its value, such as region "in(us, eu)"; in Python, a mapping."""
    resources_per_host: Annotated[
        Mapping[str, float] | None, written_as("resources_per_host", amounts)
    ] = None
    """Other Ray resources to reserve on each host."""
    placement_strategy: Literal["STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK"] = "STRICT_SPREAD"
    """STRICT_SPREAD: every host of the launch is a different node. SPREAD: different nodes if possible. PACK: the same node if possible. STRICT_PACK: all hosts on one node."""
    backend: Annotated[str | None, written_as("backend", string_or_none)] = "auto"
    """Backend of the process group: "nccl", "gloo", "mpi", "ucc", "cpu:gloo,cuda:nccl". "auto": nccl if each worker has its own GPU, else gloo. None: no process group. With nccl, collectives take CUDA tensors only; "cpu:gloo,cuda:nccl" takes both."""
    timeout: Annotated[float, written_as("timeout", number)] = 600
    """Timeout of the process group, in seconds: for ranks to join, from when all hosts can fork, and for every collective that waits for a slow rank. If workers import torch themselves (start_method "spawn", or a preload without torch), the import is part of the time to join."""
    placement_timeout: Annotated[float | None, written_as("placement_timeout", number_or_none)] = (
        600
    )
    """Time to wait for room in the cluster, in seconds; None: without limit."""
    shutdown_timeout: Annotated[float, written_as("shutdown_timeout", number)] = 5
    """Time from SIGTERM to SIGKILL for workers that must stop, in seconds."""
    max_restarts: Annotated[int, written_as("max_restarts", integer)] = 0
    """Number of times that the launch starts all workers again after a failure."""
    restart_if: Annotated[Callable[[BaseException], bool] | None, written_as_words("None")] = None
    """Function that gets the exception of a failure, and returns True if the launch may restart the workers. None: any failure."""
    spares: Annotated[int, written_as("spares", integer)] = 0
    """Number of further hosts that are reserved and warm, and take the places of hosts that are lost."""
    resize_interval: Annotated[float, written_as("resize_interval", number)] = 30
    """Shortest time from the start of workers to their restart on more hosts, with hostnames=(MIN, MAX), in seconds."""
    host_timeout: Annotated[float, written_as("host_timeout", number)] = 10
    """Time after which a silent host is taken for lost, in seconds, if the launch may restart. Its workers end by themselves in this time. Through ray://: at least RAY_CLIENT_RECONNECT_GRACE_PERIOD plus 10."""
    health_check_port: Annotated[int | None, written_as("health_check_port", integer_or_none)] = (
        None
    )
    """Port at which each host's agent answers health checks over HTTP during a run; 0: any free port. None: TORCHELASTIC_HEALTH_CHECK_PORT if that is set, else no checks."""
    linger: Annotated[float, written_as("linger", number)] = 60
    """Time that agents stay warm after a run, holding no resources, in seconds."""
    default_env_vars: Annotated[Sequence[str], written_as("default_env_vars", tuple)] = (
        DEFAULT_ENV_VARS
    )
    """Patterns of the driver's environment variables that are sent to workers."""
    extra_env_vars: Annotated[
        Sequence[str] | Mapping[str, str] | Literal["all"],
        written_as("extra_env_vars", variables),
    ] = ()
    """More environment variables for workers: patterns, NAME=value strings, or a mapping. "all": every variable, as with torchrun."""
    env_file: Annotated[str | os.PathLike[str] | None, written_as("env_file", string_or_none)] = (
        None
    )
    """A file on each host that bash sources for the workers' environment."""
    log_handlers: Annotated[
        LogHandlers | Callable[[], LogHandlers], written_as_words("auto", "None")
    ] = "auto"
    """Destination of the workers' output: files and the driver's console or loggers ("auto"), nowhere (None), or exactly these handlers. A function that returns one of these is called for each launch."""
    console_ranks: Annotated[Sequence[int] | Literal["all"], written_as("console_ranks", ranks)] = (
        0,
    )
    """Ranks whose output reaches your console or loggers, unless log_handlers says otherwise: a list, or "all"."""
    progress: bool | None = None
    """Show the progress of a run. None: on a terminal, in a notebook and in a job's log."""
    preload: Annotated[Sequence[str], written_as("preload", tuple)] = (
        "torch",
        "torch.distributed",
    )
    """Modules that are imported once per host, before workers are forked; not with "spawn"."""
    start_method: StartMethod = "fork"
    """"fork" workers from the host's template, or "spawn" fresh interpreters."""
    runtime_env: Annotated[Mapping[str, Any] | None, written_as_json()] = None
    """Ray's runtime environment for the agents, and so for the workers. A local working_dir belongs in ray.init."""
    name: Annotated[str | None, written_as("name", string_or_none)] = None
    """Name of the run in logs and errors. None: the function's name."""

    def __new__(cls, *values: Any, **options: Any) -> Self:
        """Check the arguments' names, since Python's own TypeErrors do not name the options."""
        known: Mapping[str, Field[Any]] = vars(cls).get("__dataclass_fields__", {})
        if known and vars(cls)["__dataclass_params__"].init:  # else a subclass has its own __init__
            if all(field.kw_only for field in known.values()):
                checks.check_given_by_name(values, cls.__name__)
            checks.check_option_names(options, known, f"{cls.__name__}()")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check everything that can be checked before anything starts."""
        checks.check_options({f.name: getattr(self, f.name) for f in fields(Options)})

    @property
    def least_hosts(self) -> int | None:
        """Number of hosts without which no workers are started; None if the nodes decide it."""
        return self._sizes()[0]

    @property
    def most_hosts(self) -> int | None:
        """Largest number of hosts; None if the nodes decide it."""
        return self._sizes()[1]

    @property
    def may_restart(self) -> bool:
        """True if workers may be started again in a run."""
        return self.max_restarts > 0 or self.is_elastic

    @property
    def names_its_hosts(self) -> bool:
        """True if each host has a name that the user or Slurm has given."""
        return self.hostnames == "slurm" or not (
            isinstance(self.hostnames, int | str) or checks.size(self.hostnames)
        )

    @property
    def is_elastic(self) -> bool:
        """True if the number of hosts may change during a run."""
        return self.least_hosts != self.most_hosts

    def _sizes(self) -> tuple[int | None, int | None]:
        hosts = self.hostnames
        if isinstance(hosts, str):
            return None, None
        if isinstance(hosts, int):
            return hosts, hosts
        if size := checks.size(hosts):
            return size
        return len(hosts), len(hosts)

    def explicit_variables(self) -> dict[str, str]:
        """Return the variables of `extra_env_vars` that have a value."""
        if isinstance(self.extra_env_vars, Mapping):
            return dict(self.extra_env_vars)
        return dict(entry.split("=", 1) for entry in self._extra() if "=" in entry)

    def variable_patterns(self) -> list[str]:
        """Return the patterns of the driver's variables that are sent to workers."""
        return [*self.default_env_vars, *(entry for entry in self._extra() if "=" not in entry)]

    def named_variables(self) -> set[str]:
        """Return the driver's variables that `extra_env_vars` requests by name."""
        names = {entry for entry in self._extra() if not set("=*?[") & set(entry)}
        return names - self.explicit_variables().keys()

    def _extra(self) -> Sequence[str]:
        """Return the entries of `extra_env_vars`; none if it is a mapping."""
        if isinstance(self.extra_env_vars, Mapping):
            return ()
        return ("*",) if self.extra_env_vars == "all" else self.extra_env_vars
