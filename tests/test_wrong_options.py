"""Each option is refused by its name, with what it accepts."""

import dataclasses
import functools
import re
from datetime import timedelta
from typing import Any

import pytest

import torchrunx_ray as trx


async def _decide(error: BaseException) -> bool:
    return True


class _Decides:
    async def __call__(self, _: BaseException) -> bool:
        return True


WRONG_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("hostnames", 0, ValueError, "a number of hosts of at least 1"),
    ("hostnames", "node1", ValueError, 'a list of distinct names such as ["localhost"]'),
    ("hostnames", ["a", "a"], ValueError, "distinct"),
    ("hostnames", [], ValueError, "distinct"),
    ("hostnames", [1], TypeError, "distinct names"),
    ("hostnames", 1.5, TypeError, "a number of hosts"),
    ("hostnames", (3, 2), ValueError, "with 1 <= smallest <= largest"),
    ("hostnames", (0, 2), ValueError, "with 1 <= smallest <= largest"),
    ("hostnames", (1, 2, 3), ValueError, "such as (2, 4)"),
    ("hostnames", (1,), ValueError, "such as (2, 4)"),
    ("hostnames", (1, True), TypeError, "such as (2, 4)"),
    ("hostnames", (1, 2.0), TypeError, "such as (2, 4)"),
    ("hostnames", (1.0, 2.0), TypeError, "such as (2, 4)"),
    ("hostnames", [1, 2], TypeError, "such as (2, 4)"),
    ("workers_per_host", 0, ValueError, "a number of at least 1"),
    ("workers_per_host", -2, ValueError, "a number of at least 1"),
    ("workers_per_host", 2.0, TypeError, "a number of at least 1"),
    ("workers_per_host", True, TypeError, "a number of at least 1"),
    ("workers_per_host", "all", ValueError, '"auto", "gpu", "cpu"'),
    ("workers_per_host", [], ValueError, "one per host"),
    ("workers_per_host", [1, 0], ValueError, "one per host"),
    ("workers_per_host", None, TypeError, "a number of at least 1"),
    ("gpus_per_worker", -1, ValueError, "at least 0"),
    ("gpus_per_worker", "1", TypeError, "at least 0"),
    ("gpus_per_worker", 1.5, ValueError, "a whole number of GPUs"),
    ("cpus_per_worker", -1, ValueError, "at least 0"),
    ("accelerator_type", 100, TypeError, '"A100"'),
    ("label_selector", ["us"], TypeError, "a mapping from labels to values"),
    ("label_selector", {"region": 1}, TypeError, "a mapping from labels to values"),
    ("resources_per_host", {"CPU": 1}, ValueError, "cpus_per_worker"),
    ("resources_per_host", ["TPU"], TypeError, "a mapping"),
    ("resources_per_host", {"TPU": -1}, ValueError, "a mapping"),
    ("placement_strategy", "ANYWHERE", ValueError, "STRICT_SPREAD or SPREAD"),
    ("backend", "NCCL!", ValueError, '"nccl", "gloo"'),
    ("backend", "glo", ValueError, '"nccl", "gloo"'),
    ("backend", "cpu:gloo,cuda:ncl", ValueError, '"nccl", "gloo"'),
    ("backend", 1, TypeError, '"nccl", "gloo"'),
    ("timeout", 0, ValueError, "seconds, more than 0"),
    ("timeout", -1, ValueError, "seconds, more than 0"),
    ("timeout", "600", TypeError, "seconds, more than 0"),
    ("timeout", float("nan"), ValueError, "seconds, more than 0"),
    ("timeout", timedelta(minutes=1), TypeError, "0; a timedelta has .total_seconds(), here 60"),
    ("placement_timeout", timedelta(0), TypeError, ".total_seconds(), here 0"),
    ("placement_timeout", -1, ValueError, "None, or seconds"),
    ("shutdown_timeout", None, TypeError, "seconds"),
    ("max_restarts", -1, ValueError, "an integer of at least 0"),
    ("max_restarts", 1.5, TypeError, "an integer of at least 0"),
    ("max_restarts", True, TypeError, "an integer of at least 0"),
    ("host_timeout", 2.9, ValueError, "seconds, at least 3"),
    ("host_timeout", "10", TypeError, "seconds, at least 3"),
    ("restart_if", 3, TypeError, "None, or a function"),
    ("restart_if", _decide, TypeError, "None, or a function"),
    ("restart_if", functools.partial(_decide), TypeError, "None, or a function"),
    ("restart_if", _Decides(), TypeError, "returns True or False"),
    ("spares", -1, ValueError, "an integer of at least 0"),
    ("spares", True, TypeError, "an integer of at least 0"),
    ("spares", 1.0, TypeError, "an integer of at least 0"),
    ("resize_interval", -1, ValueError, "seconds, at least 0"),
    ("resize_interval", "30", TypeError, "seconds, at least 0"),
    ("resize_interval", float("nan"), ValueError, "seconds, at least 0"),
    ("linger", -1, ValueError, "seconds"),
    ("health_check_port", -1, ValueError, "a port from 0 to 65535"),
    ("health_check_port", 65536, ValueError, "a port from 0 to 65535"),
    ("health_check_port", "8080", TypeError, "a port from 0 to 65535"),
    ("health_check_port", True, TypeError, "a port from 0 to 65535"),
    ("default_env_vars", "PATH", TypeError, "patterns"),
    ("extra_env_vars", "A=1", TypeError, "NAME=value strings"),
    ("extra_env_vars", "any", TypeError, 'or "all"'),
    ("extra_env_vars", {"SEED": 1}, TypeError, "SEED is 1, which is not a string: write '1'"),
    (
        "extra_env_vars",
        {"SEED": None},
        TypeError,
        "SEED is None, which is not a string: leave it out",
    ),
    ("extra_env_vars", {1: "1"}, TypeError, "the name 1 is not a string"),
    ("extra_env_vars", ["=x"], ValueError, "'=x': expected NAME=value, or a pattern"),
    ("extra_env_vars", [""], ValueError, "'': expected NAME=value, or a pattern"),
    ("extra_env_vars", {"A=B": "1"}, ValueError, "'A=B': expected a name without ="),
    ("extra_env_vars", ["A=\0"], ValueError, "a string without NUL"),
    ("extra_env_vars", {"BIG": "x" * 2**22}, ValueError, "BIG has 4194309 bytes"),
    ("extra_env_vars", ["BIG=" + "x" * 2**22], ValueError, "BIG has 4194309 bytes"),
    ("extra_env_vars", ("RANK=1",), ValueError, "RANK is set by the launch itself"),
    ("extra_env_vars", {"CUDA_VISIBLE_DEVICES": "0"}, ValueError, "gpus_per_worker decides GPUs"),
    ("env_file", 3, TypeError, "a path on the hosts"),
    ("log_handlers", "files", ValueError, '"auto", None, a list of logging handlers'),
    ("log_handlers", ["stdout"], TypeError, "a list of logging handlers"),
    ("log_handlers", 3, TypeError, "a list of logging handlers"),
    ("console_ranks", 0, TypeError, '"all", or a list of ranks'),
    ("console_ranks", "0", ValueError, '"all", or a list of ranks'),
    ("console_ranks", [-1], ValueError, '"all", or a list of ranks'),
    ("progress", "yes", TypeError, "None, True or False"),
    ("preload", "torch", TypeError, "names of modules"),
    ("start_method", "forkserver", ValueError, '"fork" or "spawn"'),
    ("runtime_env", [], TypeError, "a mapping"),
    (
        "runtime_env",
        {"env_var": {"A": "1"}},
        ValueError,
        "no key 'env_var', and would ignore it. Did you mean 'env_vars'?",
    ),
    ("runtime_env", {"xyz": 1}, ValueError, "The keys are conda, "),
    ("runtime_env", {"working_dir": "."}, ValueError, "ray.init(runtime_env={'working_dir': ...})"),
    ("runtime_env", {"py_modules": ["src/a"]}, ValueError, "py_modules 'src/a' is not a URI"),
    ("name", "", ValueError, "a non-empty string"),
    ("name", 3, TypeError, "a non-empty string"),
]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("nproc_per_node", "workers_per_host"),
        ("worker_per_host", "workers_per_host"),
        ("nnodes", "hostnames"),
        ("hostname", "hostnames"),
        ("nproc", "workers_per_host"),
        ("nprocs", "workers_per_host"),
        ("num_gpus", "gpus_per_worker"),
        ("gpus", "gpus_per_worker"),
    ],
)
def test_launch_names_the_option_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"no option '{name}'. Did you mean {meant}?"):
        trx.launch(print, **{name: 2})
    with pytest.raises(
        TypeError, match=rf"Launcher\(\) has no option '{name}'. Did you mean {meant}?"
    ):
        trx.Launcher(**{name: 2})


def test_options_are_given_by_name() -> None:
    launcher: Any = trx.Launcher
    with pytest.raises(TypeError) as caught:
        launcher(2, 4, backend="gloo")

    assert str(caught.value) == (
        "Launcher() takes its options by name, as in Launcher(hostnames=2, workers_per_host=4); given "
        "without a name: 2, 4. The function and its arguments go into Launcher().run(func, *args, "
        "**kwargs)."
    )


def test_subclass_of_the_launcher_may_have_other_options() -> None:
    class Ours(trx.Launcher):
        def __init__(self, nodes: int) -> None:
            super().__init__(hostnames=nodes)

    assert Ours(nodes=3).hostnames == 3
    assert Ours(3).hostnames == 3


def test_argument_of_the_function_that_is_given_as_an_option_is_told_where_it_goes() -> None:
    with pytest.raises(TypeError, match=r"no option 'epochs'\. Arguments of the function go into"):
        trx.launch(print, epochs=2)


@pytest.mark.parametrize(
    ("option", "value", "kind", "accepted"),
    WRONG_OPTIONS,
    # Without addresses, which differ from lane to lane.
    ids=[
        re.sub(r" at 0x[0-9a-f]+", "", f"{option}={value!r:.80}")
        for option, value, _, _ in WRONG_OPTIONS
    ],
)
def test_wrong_option_is_named_with_its_value_and_what_is_accepted(
    option: str, value: Any, kind: type[Exception], accepted: str
) -> None:
    with pytest.raises(kind) as caught:
        trx.Launcher(**{option: value})

    assert type(caught.value) is kind
    assert str(caught.value).startswith(option)
    assert accepted in str(caught.value)


def test_every_option_is_tested_with_a_wrong_value() -> None:
    assert {option for option, *_ in WRONG_OPTIONS} == {
        field.name for field in dataclasses.fields(trx.Launcher)
    }


def test_lists_of_hosts_and_workers_must_agree() -> None:
    with pytest.raises(ValueError, match="has 2 numbers, but hostnames=3 stands for 3 hosts;"):
        trx.Launcher(hostnames=3, workers_per_host=[1, 1])
    with pytest.raises(ValueError, match="has 2 numbers, but hostnames=1 stands for 1 host;"):
        trx.Launcher(hostnames=1, workers_per_host=[1, 1])


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"spares": 1, "hostnames": ["a", "b"]}, "give a number of hosts"),
        ({"spares": 1, "hostnames": "slurm"}, "give a number of hosts"),
        ({"spares": 1, "hostnames": "auto"}, "give a number of hosts"),
        ({"spares": 1}, "give a number of hosts"),
        ({"spares": 1, "hostnames": 2, "workers_per_host": [1, 2]}, "one number for all hosts"),
        ({"hostnames": (1, 2), "workers_per_host": [1, 2]}, "one number for all hosts"),
        ({"hostnames": (1, 2), "placement_strategy": "STRICT_PACK"}, "Use STRICT_SPREAD, SPREAD"),
        (
            {"spares": 1, "hostnames": 2, "placement_strategy": "STRICT_PACK"},
            "Use STRICT_SPREAD, SPREAD",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, Any], accepted: str
) -> None:
    with pytest.raises(ValueError, match=accepted):
        trx.Launcher(**options)


def test_launcher_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        trx.Launcher().timeout = 1  # pyright: ignore[reportAttributeAccessIssue]  # that is the test
