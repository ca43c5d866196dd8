"""What is wrong with an option or a function, before anything starts.

Every message names the option, the value, and what is accepted. Values are Any here: an
annotation does not keep a caller from giving something else.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchrunx_ray.wire.environment import forbidden

_BACKEND = re.compile(r"[a-z][a-z0-9_]*|[a-z]+:[a-z0-9_]+(,[a-z]+:[a-z0-9_]+)*")
_STRATEGIES = ("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK")


def check_options(given: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for the first option that cannot be."""
    _check_hosts(given["hostnames"])
    _check_workers(given["workers_per_host"], given["hostnames"])
    _check_amounts(given)
    _check_choices(given)
    _check_environment(given)
    _check_names(given)


def check_function(func: object) -> None:
    if not callable(func):
        raise TypeError(
            f"func={func!r} is not callable; pass the function itself, not what it returns."
        )


def _check_hosts(hosts: Any) -> None:
    accepted = '"auto", a number of hosts from 1 on, or a list of distinct host names'
    if isinstance(hosts, str):
        _require(hosts == "auto", "hostnames", hosts, accepted)
    elif _is_sequence(hosts):
        _require_strings("hostnames", hosts, accepted)
        names: list[str] = list(hosts)
        distinct = len(set(names)) == len(names) > 0 and all(names)
        _require(distinct, "hostnames", names, accepted)
    else:
        _require_int("hostnames", hosts, 1, accepted)


def _check_workers(workers: Any, hosts: Any) -> None:
    accepted = '"auto", "gpu", "cpu", a number from 1 on, or a list of such numbers, one per host'
    if isinstance(workers, str):
        _require(workers in ("auto", "gpu", "cpu"), "workers_per_host", workers, accepted)
    elif _is_sequence(workers):
        counts: list[Any] = list(workers)
        _require(bool(counts), "workers_per_host", counts, accepted)
        for count in counts:
            _require_int("workers_per_host", count, 1, accepted)
        wanted = hosts if isinstance(hosts, int) else None if hosts == "auto" else len(hosts)
        if wanted not in (None, len(counts)):
            raise ValueError(
                f"workers_per_host={counts!r} has {len(counts)} numbers, but hostnames={hosts!r} "
                f"stands for {wanted} hosts; give one number per host."
            )
    else:
        _require_int("workers_per_host", workers, 1, accepted)


def _check_amounts(given: Mapping[str, Any]) -> None:
    for option in ("timeout", "shutdown_timeout", "linger"):
        _require_number(option, given[option], "seconds from 0 on")
    _require(given["timeout"] > 0, "timeout", given["timeout"], "seconds, more than 0")
    for option, accepted in (
        ("gpus_per_worker", "None, or a number from 0 on"),
        ("cpus_per_worker", "None, or a number from 0 on"),
        ("placement_timeout", "None, or seconds from 0 on"),
    ):
        if given[option] is not None:
            _require_number(option, given[option], accepted)
    accepted = "None, or a mapping from names of resources to numbers"
    _require_mapping("resources_per_host", given["resources_per_host"], accepted)
    resources: dict[Any, Any] = dict(given["resources_per_host"] or {})
    for name, amount in resources.items():
        _require(isinstance(name, str), "resources_per_host", name, accepted, TypeError)
        _require_number("resources_per_host", amount, accepted)


def _check_choices(given: Mapping[str, Any]) -> None:
    strategy = given["placement_strategy"]
    _require(strategy in _STRATEGIES, "placement_strategy", strategy, " or ".join(_STRATEGIES))
    method = given["start_method"]
    _require(method in ("fork", "spawn"), "start_method", method, '"fork" or "spawn"')
    backend = given["backend"]
    accepted = (
        '"auto", "nccl", "gloo", "mpi", "ucc", one per device such as "cpu:gloo,cuda:nccl", or None'
    )
    if backend is not None:
        _require(isinstance(backend, str), "backend", backend, accepted, TypeError)
        _require(bool(_BACKEND.fullmatch(backend)), "backend", backend, accepted)


def _check_environment(given: Mapping[str, Any]) -> None:
    _require_strings("default_env_vars", given["default_env_vars"], "patterns such as WANDB_*")
    extra = given["extra_env_vars"]
    accepted = "patterns such as WANDB_*, NAME=value strings, or a mapping from names to strings"
    if _is_mapping(extra):
        _require_strings("extra_env_vars", [*extra, *extra.values()], accepted)
    else:
        _require_strings("extra_env_vars", extra, accepted)
    names: list[str] = [entry.partition("=")[0] for entry in extra]
    for name in names:
        if forbidden(name):
            raise ValueError(
                f"extra_env_vars: {name} is set by the launch itself, for every worker; leave it "
                "out. hostnames and workers_per_host decide ranks, gpus_per_worker decides GPUs."
            )
    file = given["env_file"]
    is_path = file is None or _is_path(file)
    _require(is_path, "env_file", file, "None, or a path on the hosts", TypeError)


def _check_names(given: Mapping[str, Any]) -> None:
    accepted = 'names of modules, such as ("torch", "torch.distributed")'
    _require_strings("preload", given["preload"], accepted)
    accepted = "None, or a mapping as for Ray's runtime_env"
    _require_mapping("runtime_env", given["runtime_env"], accepted)
    name = given["name"]
    accepted = "None, or a text that is not empty"
    _require(name is None or isinstance(name, str), "name", name, accepted, TypeError)
    _require(name != "", "name", name, accepted)


def _require(
    ok: bool, option: str, value: object, accepted: str, kind: type[Exception] = ValueError
) -> None:
    if not ok:
        raise kind(f"{option}={value!r}: accepted is {accepted}.")


def _require_int(option: str, value: Any, least: int, accepted: str) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int, option, value, accepted, TypeError)
    _require(value >= least, option, value, accepted)


def _require_number(option: str, value: Any, accepted: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(is_number, option, value, accepted, TypeError)
    _require(0 <= value < math.inf, option, value, accepted)


def _require_strings(option: str, values: Any, accepted: str) -> None:
    are_many = _is_sequence(values) and not isinstance(values, str)
    _require(are_many, option, values, accepted, TypeError)
    for value in values:
        _require(isinstance(value, str), option, values, accepted, TypeError)


def _require_mapping(option: str, value: Any, accepted: str) -> None:
    _require(value is None or _is_mapping(value), option, value, accepted, TypeError)


# Predicates, since isinstance would narrow Any to containers of unknown.


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)
