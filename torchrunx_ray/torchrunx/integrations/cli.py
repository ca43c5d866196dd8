"""torchrunx's options for the command line of a script that uses argparse."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from torchrunx_ray.torchrunx.launcher import DEFAULT_ENV_VARS_FOR_COPY, Launcher

__all__ = ["add_torchrunx_argument_group", "launcher_from_args"]

_HOSTS = (["auto"], ["slurm"])
_WORKERS = ("cpu", "gpu")


def add_torchrunx_argument_group(parser: ArgumentParser) -> None:
    """Add a group of options to the parser, from which `launcher_from_args` makes a Launcher."""
    add = parser.add_argument_group("torchrunx").add_argument
    add(
        "--hostnames",
        nargs="+",
        default="auto",
        help="nodes of the Ray cluster, 'auto' for all nodes, or 'slurm' for the nodes of the "
        "allocation (default: auto)",
    )
    add(
        "--workers-per-host",
        nargs="+",
        type=_workers,
        default="gpu",
        help="a number, one number per host, 'gpu' or 'cpu' (default: gpu)",
    )
    add("--ssh-config-file", help="has no effect: Ray starts the agents")
    add(
        "--backend",
        choices=["nccl", "gloo", "mpi", "ucc", "None"],
        default="nccl",
        help="backend of the process group; 'None' for no group (default: nccl)",
    )
    add(
        "--worker-timeout",
        type=int,
        default=600,
        help="timeout of the process group, in seconds (default: 600)",
    )
    add("--agent-timeout", type=int, default=60, help="has no effect: Ray watches the agents")
    add(
        "--copy-env-vars",
        nargs="+",
        default=DEFAULT_ENV_VARS_FOR_COPY,
        help="patterns of environment variables that are copied to workers (default: "
        f"{' '.join(DEFAULT_ENV_VARS_FOR_COPY)})",
    )
    add(
        "--extra-env-vars",
        nargs="*",
        type=_assignment,
        metavar="NAME=VALUE",
        help="further environment variables of workers",
    )
    add("--env-file", help="a file on each host that bash sources for the workers")


def launcher_from_args(args: Namespace) -> Launcher:
    """Return the launcher that the options of `add_torchrunx_argument_group` describe."""
    return Launcher(
        # The command line gives a list also for a word; a list of one host stays a list.
        hostnames=args.hostnames[0] if list(args.hostnames) in _HOSTS else args.hostnames,
        workers_per_host=_one_or_many(args.workers_per_host),
        ssh_config_file=args.ssh_config_file,
        backend=None if args.backend == "None" else args.backend,
        worker_timeout=args.worker_timeout,
        agent_timeout=args.agent_timeout,
        copy_env_vars=tuple(args.copy_env_vars),
        extra_env_vars=_pairs(args.extra_env_vars),
        env_file=args.env_file,
    )


def _workers(text: str) -> str | int:
    if text in _WORKERS:
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number, 'gpu' or 'cpu'") from None


def _assignment(text: str) -> str:
    if "=" not in text:
        raise ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return text


def _one_or_many(given: Any) -> Any:
    """Return a single item: a default is a word already, while the command line gives a list of one word."""
    return given[0] if not isinstance(given, str) and len(given) == 1 else given


def _pairs(given: Sequence[str] | None) -> dict[str, str] | None:
    return None if given is None else dict(text.split("=", 1) for text in given)
