"""Functions that take much along are told of, with the name of what is large."""

import functools
import types
import weakref
from typing import Any

import numpy
import pytest
import torch

import torchrunx_ray as trx
from torchrunx_ray.driver.call import captures
from torchrunx_ray.driver.call.captures import LARGE


@pytest.fixture(autouse=True)
def _nothing_was_told_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "_told", set())
    monkeypatch.setattr(captures, "_looked_at", weakref.WeakSet())


@pytest.fixture
def notebook() -> dict[str, Any]:
    """The globals of code that has no module to be imported from, as in a notebook."""
    main = types.ModuleType("of_a_notebook")
    exec(
        """
import torch

def use_array():
    return len(array)

def call_other():
    return [use_array() for _ in range(1)]

class Trainer:
    def train(self):
        return len(array)

def take(tensor):
    return tensor.shape[0]
""",
        vars(main),
    )
    return vars(main)


def test_large_global_is_named_with_its_size_once(
    launcher: trx.Launcher, notebook: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    notebook["array"] = numpy.zeros(LARGE * 2, dtype=numpy.uint8)
    for _ in range(2):
        assert launcher.run(notebook["use_array"]).rank(0) == LARGE * 2

    (said,) = [
        record.getMessage() for record in caplog.records if "sends to" in record.getMessage()
    ]
    assert said.startswith("global 'array' used by use_array has 128 MiB, which every launch")
    assert "ray.put" in said


@pytest.mark.parametrize(
    ("call", "path"),
    [
        ("call_other", "global 'array' used by global 'use_array' used by call_other"),
        ("Trainer().train", "global 'array' used by train"),
        ("functools.partial(use_array)", "global 'array' used by use_array"),
    ],
)
def test_large_global_is_found_behind_what_is_called(
    launcher: trx.Launcher,
    notebook: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    call: str,
    path: str,
) -> None:
    notebook["array"] = numpy.zeros(LARGE, dtype=numpy.uint8)
    launcher.run(eval(call, {**notebook, "functools": functools}))

    assert f"{path} has 64 MiB" in caplog.text


def test_large_variable_of_a_closure_and_large_list_are_named(
    launcher: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    tensor, texts = torch.zeros(LARGE // 4), ["x" * 2**20 + str(i) for i in range(65)]
    launcher.run(lambda: (tensor.shape, len(texts)))

    assert "variable 'tensor' captured by <lambda> has 64 MiB" in caplog.text
    assert "variable 'texts' captured by <lambda> has 65 MiB" in caplog.text


def test_large_argument_is_no_cause_for_a_warning(
    launcher: trx.Launcher, notebook: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    notebook["array"] = numpy.zeros(LARGE, dtype=numpy.uint8)
    launcher.run(notebook["take"], torch.zeros(LARGE, dtype=torch.uint8))

    assert "sends to" not in caplog.text


def test_large_default_and_large_global_that_is_only_set_are_named(
    launcher: trx.Launcher, notebook: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    exec(
        """
def reset(*, weights=torch.zeros(64 * 2**18)):
    global state
    state = None
""",
        notebook,
    )
    notebook["state"] = numpy.zeros(LARGE, dtype=numpy.uint8)
    launcher.run(notebook["reset"])

    assert "default 'weights' of reset has 64 MiB" in caplog.text
    assert "global 'state' used by reset has 64 MiB" in caplog.text
