"""Functions, values and exceptions of every kind travel."""

import functools
import os
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchrunx_ray as trx


def of_a_module(x: int) -> int:
    return x + int(os.environ["RANK"])


class Adder:
    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __call__(self, x: int) -> int:
        return self.amount + of_a_module(x)

    def method(self, x: int) -> int:
        return self(x)

    @classmethod
    def class_method(cls, x: int) -> int:
        return cls(1)(x)


def closure_over(amount: int) -> Callable[[int], int]:
    def add(x: int) -> int:
        return amount + of_a_module(x)

    return add


@pytest.mark.parametrize(
    "func",
    [
        pytest.param(lambda x: 1 + of_a_module(x), id="lambda"),
        pytest.param(closure_over(1), id="closure"),
        pytest.param(functools.partial(of_a_module, x=11), id="partial"),
        pytest.param(Adder(1), id="callable object"),
        pytest.param(Adder(1).method, id="bound method"),
        pytest.param(Adder.class_method, id="class method"),
        pytest.param(functools.partial(Adder(1).method, 10), id="partial of a method"),
    ],
)
def test_any_callable_can_be_launched(launcher: trx.Launcher, func: Callable[..., int]) -> None:
    args = () if isinstance(func, functools.partial) else (10,)

    assert list(launcher.run(func, *args)) == [11, 12]


def test_function_of_a_module(launcher: trx.Launcher) -> None:
    assert list(launcher.run(of_a_module, 1)) == [1, 2]


def test_builtin_function(launcher: trx.Launcher) -> None:
    assert list(launcher.run(max, 1, 2)) == [2, 2]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        {"nested": [1, (2.0, {3})]},
        b"x" * 1_000_000,
        np.arange(300_000).reshape(3, -1),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_travel_both_ways(launcher: trx.Launcher, value: Any) -> None:
    returned = launcher.run(lambda x: x, value).rank(1)

    np.testing.assert_equal(returned, value)
    assert type(returned) is type(value)


def test_tensors_arrive_writable_and_one_worker_does_not_see_anothers(
    launcher: trx.Launcher,
) -> None:
    def add_rank(tensor: torch.Tensor, array: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        tensor += int(os.environ["RANK"])
        array += int(os.environ["RANK"])
        return tensor, array

    result = launcher.run(add_rank, torch.zeros(100_000), np.zeros(100_000))

    for rank, (tensor, array) in enumerate(result):
        assert tensor.sum() == array.sum() == rank * 100_000


def test_everything_of_main_travels_both_ways(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import dataclasses, torchrunx_ray as trx

@dataclasses.dataclass
class Config:
    steps: int

class Trouble(Exception):
    def __init__(self, what, code):
        super().__init__(f"{what}: {code}")
        self.code = code

def train(config):
    assert isinstance(config, Config)
    if config.steps < 0:
        raise Trouble("steps", config.steps)
    return Config(config.steps + 1)

launcher = trx.Launcher(workers_per_host=2)
returned = launcher.run(train, Config(1)).rank(1)
assert type(returned) is Config and returned == Config(2)
try:
    launcher.run(train, Config(-7))
except Trouble as error:
    assert type(error) is Trouble and error.code == -7 and str(error) == "steps: -7"
    print("all of it")
"""
    )

    assert done.stdout == "all of it\n", done.stderr


def test_module_beside_the_script_reaches_the_workers(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Any
) -> None:
    (tmp_path / "beside_the_script.py").write_text("def answer():\n    return 42\n")
    done = run_script(
        """
import beside_the_script, torchrunx_ray as trx
print(trx.launch(beside_the_script.answer, workers_per_host=1).rank(0))
"""
    )

    assert done.stdout == "42\n", done.stderr
