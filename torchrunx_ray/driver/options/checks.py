"""Checks of options, before anything starts.

Every message names the option, the value, and the expected values. Values are Any here, since
annotations do not prevent a caller from passing other types.
"""

import inspect
import logging
import math
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from typing import Any

from ray.runtime_env import RuntimeEnv

from torchrunx_ray.errors import counted
from torchrunx_ray.wire.environment import forbidden, too_large

_BACKENDS = ("auto", "nccl", "gloo", "mpi", "ucc", "xccl", "hccl", "fake")
"""Backends of torch, and of the accelerators that torch knows by name."""

_STRATEGIES = ("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK")
_METHODS = ("fork", "spawn")

_LEAST_HOST_TIMEOUT_S = 3
"""Time for some requests for a lease, of which a busy machine may delay one or two."""

EXPECTED = {
    "func_kwargs": "None, or a mapping from names to values",
    "hostnames": '"auto", "slurm", a number of hosts of at least 1, a smallest and a largest number such as (2, 4), or a list of distinct names such as ["localhost"]',
    "workers_per_host": '"auto", "gpu", "cpu", "slurm", a number of at least 1, or a list of such numbers, one per host',
    "gpus_per_worker": "None, or a number of at least 0",
    "cpus_per_worker": "None, or a number of at least 0",
    "label_selector": 'None, or a mapping from labels to values, such as {"region": "in(us, eu)"}',
    "resources_per_host": "None, or a mapping from names of resources to numbers",
    "timeout": "seconds, more than 0",
    "placement_timeout": "None, or seconds, at least 0",
    "shutdown_timeout": "seconds, at least 0",
    "max_restarts": "an integer of at least 0",
    "restart_if": "None, or a function that gets an exception and returns True or False",
    "spares": "an integer of at least 0",
    "resize_interval": "seconds, at least 0",
    "host_timeout": f"seconds, at least {_LEAST_HOST_TIMEOUT_S}",
    "health_check_port": "None, or a port from 0 to 65535, where 0 stands for any free one",
    "linger": "seconds, at least 0",
    "console_ranks": '"all", or a list of ranks such as (0, 1)',
    "accelerator_type": 'None, or a string such as "A100"',
    "placement_strategy": " or ".join(_STRATEGIES),
    "backend": '"auto", "nccl", "gloo", "mpi", "ucc", one per device such as "cpu:gloo,cuda:nccl", or None',
    "default_env_vars": "patterns such as WANDB_*",
    "extra_env_vars": 'patterns such as WANDB_*, NAME=value strings, a mapping from names to strings, or "all"',
    "env_file": "None, or a path on the hosts",
    "preload": 'names of modules, such as ("torch", "torch.distributed")',
    "start_method": '"fork" or "spawn"',
    "runtime_env": "None, or a mapping as for Ray's runtime_env",
    "log_handlers": '"auto", None, a list of logging handlers, or a function that returns one of these',
    "progress": "None, True or False",
    "name": "None, or a non-empty string",
}
"""Values that options accept, for error messages in Python and on a command line."""

_LEAST_AND_MOST = (
    "a smallest and a largest number of hosts, such as (2, 4), with 1 <= smallest <= largest"
)

_PLUGINS = "RAY_RUNTIME_ENV_PLUGINS"
"""Ray's variable for plug-ins, which add keys to a runtime_env."""

_ELSEWHERE = {
    **dict.fromkeys(("nproc_per_node", "nproc", "nprocs"), "workers_per_host"),
    **dict.fromkeys(("num_workers", "num_processes"), "workers_per_host"),
    **dict.fromkeys(("nnodes", "num_nodes", "hosts", "nodes", "hostname"), "hostnames"),
    **dict.fromkeys(("num_gpus", "gpus"), "gpus_per_worker"),
    **dict.fromkeys(("num_cpus", "cpus"), "cpus_per_worker"),
    **dict.fromkeys(("env", "env_vars"), "extra_env_vars"),
    **dict.fromkeys(("max_failures", "max_retries"), "max_restarts"),
    "copy_env_vars": "default_env_vars",
    "worker_timeout": "timeout",
    "handlers": "log_handlers",
    "args": "func_args",
    "kwargs": "func_kwargs",
}
"""Option names of torchrun, torchrunx, Ray Train and others, with this package's names."""


def check_options(given: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for the first invalid option."""
    _check_hosts(given["hostnames"])
    _check_workers(given["workers_per_host"], given["hostnames"])
    _check_amounts(given)
    _check_restarts(given)
    _check_choices(given)
    _check_environment(given)
    _check_names(given)
    _check_output(given)


def check_option_names(given: Iterable[str], known: Iterable[str], face: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            near = _ELSEWHERE.get(name) or next(iter(get_close_matches(name, known, n=1)), None)
            meant = f"Did you mean {near}? " if near else ""
            raise TypeError(
                f"{face} has no option {name!r}. {meant}Arguments of the function go into "
                "launch(func, func_args, func_kwargs) or Launcher().run(func, *args, **kwargs); the "
                f"options are {', '.join(known)}."
            )


def check_given_by_name(values: Sequence[Any], face: str) -> None:
    if values:
        raise TypeError(
            f"{face}() takes its options by name, as in {face}(hostnames=2, workers_per_host=4); given "
            f"without a name: {', '.join(map(reprlib.repr, values))}. The function and its arguments go "
            "into Launcher().run(func, *args, **kwargs)."
        )


def check_handlers(handlers: Any) -> None:
    """Check log_handlers, or the value that a function given as log_handlers returned."""
    if isinstance(handlers, str):
        _require(handlers == "auto", "log_handlers", handlers)
    elif handlers is not None:
        _require(_is_sequence(handlers), "log_handlers", handlers, kind=TypeError)
        are_handlers = all(isinstance(handler, logging.Handler) for handler in handlers)
        _require(are_handlers, "log_handlers", handlers, kind=TypeError)


def check_arguments(args: Any, kwargs: Any) -> None:
    are_many = _is_sequence(args) and not isinstance(args, str)
    _require(are_many, "func_args", args, f"a list or tuple, such as ({args!r},)", TypeError)
    _require_mapping("func_kwargs", kwargs)


def _check_hosts(hosts: Any) -> None:
    if isinstance(hosts, str):
        _require(hosts in ("auto", "slurm"), "hostnames", hosts)
    elif _has_numbers(hosts):
        least, most = _least_and_most(hosts)
        _require(1 <= least <= most, "hostnames", hosts, _LEAST_AND_MOST)
    elif _is_sequence(hosts):
        _require_strings("hostnames", hosts)
        names: list[str] = list(hosts)
        _require(len(set(names)) == len(names) > 0 and all(names), "hostnames", names)
    else:
        _require_int("hostnames", hosts, 1)


def _check_workers(workers: Any, hosts: Any) -> None:
    if isinstance(workers, str):
        _require(workers in ("auto", "gpu", "cpu", "slurm"), "workers_per_host", workers)
    elif _is_sequence(workers):
        counts: list[Any] = list(workers)
        _require(bool(counts), "workers_per_host", counts)
        for count in counts:
            _require_int("workers_per_host", count, 1)
        if size(hosts):
            raise ValueError(
                f"workers_per_host={counts!r} with hostnames={hosts!r}, whose number of hosts may change: give one "
                'number for all hosts, or "gpu" or "cpu".'
            )
        wanted = hosts if isinstance(hosts, int) else None if isinstance(hosts, str) else len(hosts)
        if wanted not in (None, len(counts)):
            raise ValueError(
                f"workers_per_host={counts!r} has {counted(len(counts), 'number')}, but hostnames={hosts!r} "
                f"stands for {counted(wanted, 'host')}; give one number per host."
            )
    else:
        _require_int("workers_per_host", workers, 1)


def _check_restarts(given: Mapping[str, Any]) -> None:
    _require_int("max_restarts", given["max_restarts"], 0)
    _check_sizes(given)
    timeout = given["host_timeout"]
    _require_number("host_timeout", timeout)
    _require(timeout >= _LEAST_HOST_TIMEOUT_S, "host_timeout", timeout)
    port = given["health_check_port"]
    if port is not None:
        _require_int("health_check_port", port, 0)
        _require(port < 65536, "health_check_port", port)
    wanted = given["restart_if"]
    is_plain = callable(wanted) and not (
        inspect.iscoroutinefunction(wanted) or inspect.iscoroutinefunction(type(wanted).__call__)
    )
    _require(wanted is None or is_plain, "restart_if", wanted, kind=TypeError)


def _check_sizes(given: Mapping[str, Any]) -> None:
    hosts, spares = given["hostnames"], given["spares"]
    _require_int("spares", spares, 0)
    is_counted = isinstance(hosts, int) or size(hosts) is not None
    if spares and not is_counted:
        raise ValueError(
            f"spares={spares} with hostnames={hosts!r}: a spare takes the place of any host, so give a number of hosts, "
            "such as hostnames=4, or hostnames=(2, 4)."
        )
    workers = given["workers_per_host"]
    if spares and not isinstance(workers, int | str):
        raise ValueError(
            f"spares={spares} with workers_per_host={list(workers)!r}: a spare takes the place of any host, so give one "
            'number for all hosts, or "gpu" or "cpu".'
        )
    _require_number("resize_interval", given["resize_interval"])
    strategy = given["placement_strategy"]
    if strategy == "STRICT_PACK" and (spares or size(hosts)):
        what = f"spares={spares}" if spares else f"hostnames={hosts!r}"
        raise ValueError(
            f"placement_strategy='STRICT_PACK' with {what}: all hosts of such a launch are on one node, where none can "
            "be added. Use STRICT_SPREAD, SPREAD or PACK, or a fixed number of hosts."
        )


def size(hosts: Any) -> tuple[int, int] | None:
    """Return the smallest and the largest number of hosts if `hostnames` gives them."""
    return _least_and_most(hosts) if _has_numbers(hosts) else None


def _has_numbers(hosts: Any) -> bool:
    return _is_tuple(hosts) and any(isinstance(each, int) for each in hosts)


def _least_and_most(hosts: Any) -> tuple[int, int]:
    _require(len(hosts) == 2, "hostnames", hosts, _LEAST_AND_MOST)
    for each in hosts:
        is_int = isinstance(each, int) and not isinstance(each, bool)
        _require(is_int, "hostnames", hosts, _LEAST_AND_MOST, TypeError)
    return hosts


def _check_amounts(given: Mapping[str, Any]) -> None:
    for option in ("timeout", "shutdown_timeout", "linger"):
        _require_number(option, given[option])
    _require(given["timeout"] > 0, "timeout", given["timeout"])
    for option in ("gpus_per_worker", "cpus_per_worker", "placement_timeout"):
        if given[option] is not None:
            _require_number(option, given[option])
    gpus = given["gpus_per_worker"] or 0
    expected = "a fraction of one GPU, or a whole number of GPUs"
    _require(gpus <= 1 or gpus == int(gpus), "gpus_per_worker", gpus, expected)
    _require_mapping("resources_per_host", given["resources_per_host"])
    resources: dict[Any, Any] = dict(given["resources_per_host"] or {})
    for name, amount in resources.items():
        _require(isinstance(name, str), "resources_per_host", name, kind=TypeError)
        if name in ("CPU", "GPU"):
            raise ValueError(
                f"resources_per_host={resources!r}: reserve {name}s with {name.lower()}s_per_worker."
            )
        _require_number("resources_per_host", amount)


def _check_choices(given: Mapping[str, Any]) -> None:
    for option, choices in (("placement_strategy", _STRATEGIES), ("start_method", _METHODS)):
        _require(given[option] in choices, option, given[option])
    backend, gpus = given["backend"], given["gpus_per_worker"]
    if backend == "nccl" and gpus is not None and gpus < 1:
        raise ValueError(
            f"backend='nccl' with gpus_per_worker={gpus!r}: nccl refuses two ranks on one GPU. Give "
            "each worker a GPU of its own, or use backend='gloo'."
        )
    _require_kind("backend", backend, str)
    if backend is not None:
        names = [part.rpartition(":")[2] for part in backend.split(",")]
        _require(all(name in _BACKENDS for name in names), "backend", backend)


def _check_environment(given: Mapping[str, Any]) -> None:
    _require_strings("default_env_vars", given["default_env_vars"])
    _check_extra_variables(given["extra_env_vars"])
    _require_kind("env_file", given["env_file"], str | os.PathLike)


def _check_extra_variables(extra: Any) -> None:
    if extra == "all":
        return
    if _is_mapping(extra):
        _require_strings_by_name(extra)
        names, texts = list(extra), [*extra, *extra.values()]
        for name in names:
            _require(name and "=" not in name, "extra_env_vars", name, "a name without =")
    else:
        _require_strings("extra_env_vars", extra)
        names, texts = [entry.partition("=")[0] for entry in extra], extra
        for name, entry in zip(names, extra, strict=True):
            _require(name, "extra_env_vars", entry, "NAME=value, or a pattern such as WANDB_*")
    for text in texts:
        _require("\0" not in text, "extra_env_vars", text, "a string without NUL characters")
    pairs = (
        extra
        if _is_mapping(extra)
        else dict(entry.split("=", 1) for entry in extra if "=" in entry)
    )
    if (problem := too_large(pairs)) is not None:
        raise ValueError(f"extra_env_vars: {problem}")
    for name in filter(forbidden, names):
        raise ValueError(
            f"extra_env_vars: {name} is set by the launch itself, for every worker; leave it "
            "out. hostnames and workers_per_host decide ranks, gpus_per_worker decides GPUs."
        )


def _require_strings_by_name(extra: Any) -> None:
    for name, value in extra.items():
        if not isinstance(name, str):
            raise TypeError(
                f"extra_env_vars: the name {name!r} is not a string; write {str(name)!r}."
            )
        if not isinstance(value, str):
            instead = "leave it out" if value is None else f"write {str(value)!r}"
            raise TypeError(
                f"extra_env_vars: {name} is {value!r}, which is not a string: {instead}."
            )


def _check_names(given: Mapping[str, Any]) -> None:
    _require_kind("accelerator_type", given["accelerator_type"], str)
    selector = given["label_selector"]
    _require_mapping("label_selector", selector)
    texts: dict[Any, Any] = dict(selector or {})
    for text in [*texts, *texts.values()]:
        _require(isinstance(text, str), "label_selector", selector, kind=TypeError)
    _require_strings("preload", given["preload"])
    _require_mapping("runtime_env", given["runtime_env"])
    _check_runtime_env(given["runtime_env"] or {})
    _require_kind("name", given["name"], str)
    _require(given["name"] != "", "name", given["name"])


def _check_runtime_env(given: Any) -> None:
    """Refuse unknown keys, which Ray ignores, and local folders, which Ray uploads only when a driver joins."""
    _check_keys_of_runtime_env(given)
    modules = given.get("py_modules") or ()
    for option, uris in (
        ("working_dir", [given.get("working_dir")]),
        ("py_modules", modules if _is_sequence(modules) else [modules]),
    ):
        for uri in uris:
            if uri is not None and "://" not in str(uri):
                raise ValueError(
                    f"runtime_env: {option} {str(uri)!r} is not a URI. Ray uploads local code only when the "
                    f"driver joins the cluster. Call ray.init(runtime_env={{{option!r}: ...}}) before the "
                    f"launch, or use `ray job submit`. A launch accepts only URIs, such as 's3://bucket/code.zip'."
                )


def _check_keys_of_runtime_env(given: Any) -> None:
    known: set[str] = getattr(RuntimeEnv, "known_fields", set())
    if not known or _PLUGINS in os.environ:
        return
    for name in given:
        if name not in known:
            near = next(iter(get_close_matches(str(name), known, n=1)), None)
            meant = f" Did you mean {near!r}?" if near else ""
            public = ", ".join(sorted(each for each in known if not each.startswith("_")))
            raise ValueError(
                f"runtime_env: Ray has no key {name!r}, and would ignore it.{meant} The keys are {public}. For "
                f"the key of a plug-in, set {_PLUGINS} in the driver, too."
            )


def _check_output(given: Mapping[str, Any]) -> None:
    if not callable(given["log_handlers"]):
        check_handlers(given["log_handlers"])
    ranks = given["console_ranks"]
    if isinstance(ranks, str):
        _require(ranks == "all", "console_ranks", ranks)
    else:
        _require(_is_sequence(ranks), "console_ranks", ranks, kind=TypeError)
        for rank in ranks:
            _require_int("console_ranks", rank, 0)
    _require_kind("progress", given["progress"], bool)


def _require(
    ok: bool, option: str, value: object, expected: str = "", kind: type[Exception] = ValueError
) -> None:
    """Raise an exception of this kind if a value is not ok. `expected` replaces the option's EXPECTED."""
    if not ok:
        raise kind(f"{option}={value!r}: expected {expected or EXPECTED[option]}.")


def _require_int(option: str, value: Any, least: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int, option, value, kind=TypeError)
    _require(value >= least, option, value)


def _require_number(option: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    expected = EXPECTED[option]
    given: object = value  # isinstance would narrow Any
    if isinstance(given, timedelta):
        expected += f"; a timedelta has .total_seconds(), here {given.total_seconds():g}"
    _require(is_number, option, value, expected, TypeError)
    _require(0 <= value < math.inf, option, value)


def _require_strings(option: str, values: Any) -> None:
    are_many = _is_sequence(values) and not isinstance(values, str)
    are_strings = are_many and all(isinstance(value, str) for value in values)
    _require(are_strings, option, values, kind=TypeError)


def _require_kind(option: str, value: Any, accepted: Any) -> None:
    _require(value is None or isinstance(value, accepted), option, value, kind=TypeError)


def _require_mapping(option: str, value: Any) -> None:
    _require_kind(option, value, Mapping)


# Predicates, since a direct isinstance would narrow Any to containers of unknown types.


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)
