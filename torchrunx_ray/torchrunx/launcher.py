"""torchrunx's Launcher, translated into `torchrunx_ray.Launcher`."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torchrunx_ray as trx
from torchrunx_ray.torchrunx.records import default_handlers_of_any_hosts, named_as_there

P = ParamSpec("P")
R = TypeVar("R")

HandlerFactory = Callable[[], list[logging.Handler]]

DEFAULT_ENV_VARS_FOR_COPY = (
    "PATH",
    "LD_LIBRARY*",
    "LIBRARY_PATH",
    "PYTHON*",
    "CUDA*",
    "TORCH*",
    "PYTORCH*",
    "NCCL*",
)


# The types suit tyro: it takes the first type of a union that fits, so words come before lists, and it cannot
# parse os.PathLike[str].
@dataclass
class Launcher:
    """Launches functions on the hosts of a Ray cluster, with the options of torchrunx 0.4."""

    hostnames: Literal["auto", "slurm"] | list[str] = "auto"
    """Hosts to launch on: these nodes, all nodes of the Ray cluster ("auto"), or the nodes of the Slurm allocation ("slurm")."""
    workers_per_host: Literal["cpu", "gpu"] | int | list[int] = "gpu"
    """Workers on each host: a number, one number per host, or one per CPU or GPU."""
    ssh_config_file: str | Path | None = None
    """Has no effect: Ray starts the agents."""
    backend: Literal["nccl", "gloo", "mpi", "ucc"] | None = "nccl"
    """Backend of the process group; None for no process group."""
    worker_timeout: int = 600
    """Timeout of the process group, in seconds."""
    agent_timeout: int = 60
    """Has no effect: Ray watches the agents."""
    copy_env_vars: tuple[str, ...] = DEFAULT_ENV_VARS_FOR_COPY
    """Patterns of environment variables that are copied to workers."""
    extra_env_vars: dict[str, str] | None = None
    """Further environment variables of workers."""
    env_file: str | Path | None = None
    """A file on each host that bash sources for the workers' environment."""
    handler_factory: HandlerFactory | Literal["auto"] | None = field(default="auto", init=False)
    """Makes the logging handlers for the workers' output; set by `set_logging_handlers`."""

    def set_logging_handlers(
        self, handler_factory: HandlerFactory | Literal["auto"] | None
    ) -> "Launcher":
        """Send the workers' output to the handlers that this function makes. Return the launcher.

        With "auto", all output goes to files, and the output of the first host and worker also goes to loggers. With
        None, output goes to no handler.
        """
        self.handler_factory = handler_factory
        return self

    # torchrunx accepts func and self by name, so neither is positional-only.
    def run(self, func: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "trx.LaunchResult[R]":
        """Call the function on every worker, and wait for all of them.

        Raise the exception of the first worker that failed, as the same type. Other failures raise WorkerFailedError,
        AgentFailedError, or another RuntimeError.
        """
        self._warn_of_what_means_nothing()
        launcher = trx.Launcher(
            hostnames=self.hostnames,
            workers_per_host=self.workers_per_host,
            backend=self.backend,
            timeout=self.worker_timeout,
            default_env_vars=self.copy_env_vars,
            extra_env_vars=self.extra_env_vars or {},
            env_file=self.env_file,
            log_handlers=_log_handlers(self.handler_factory),
        )
        if self.hostnames == "auto" and _is_whole_cluster_here():
            launcher = replace(launcher, hostnames=["localhost"])
        return launcher.run(func, *args, **kwargs)

    def _warn_of_what_means_nothing(self) -> None:
        given = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in fields(self)
            if each.name in ("ssh_config_file", "agent_timeout")
            and getattr(self, each.name) != each.default
        ]
        if given:
            have, them = ("has", "it") if len(given) == 1 else ("have", "them")
            warnings.warn(
                f"{' and '.join(given)} {have} no effect in torchrunx_ray: Ray starts the agents, not "
                f"SSH, and Ray watches them. Leave {them} out.",
                stacklevel=3,
            )


def _is_whole_cluster_here() -> bool:
    """Return True if "auto" means only this machine, which torchrunx calls localhost."""
    from torchrunx_ray.driver.cluster import connection, inventory

    connection.connect()
    return [inventory.is_here(node.node_id) for node in inventory.live_nodes()] == [True]


def _log_handlers(factory: Any) -> Callable[[], Sequence[logging.Handler]] | None:
    if factory is None:
        return None
    if factory == "auto":
        return lambda: named_as_there(default_handlers_of_any_hosts())
    if not callable(factory):
        raise TypeError(
            f'handler_factory={factory!r}: expected "auto", None, or a function that returns a list of '
            "logging handlers."
        )
    return lambda: named_as_there(factory())
