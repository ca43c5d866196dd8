"""Transformers' Trainer and Accelerate take the workers of a launch for their processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[[str], list[str]]
Call = Callable[..., Any]


def test_trainer_has_the_losses_of_one_process_with_the_whole_batch(
    run_example: Run, call_plainly: Call, tmp_path: Path
) -> None:
    losses, answer = run_example("transformers_trainer")[-2:]

    expected = call_plainly("transformers_trainer", "train", str(tmp_path / "model"), 16)
    assert len(expected) == 5
    assert [float(text) for text in losses.split()[1:]] == pytest.approx(expected, abs=1e-3)
    assert expected[-1] < 0.5 < expected[0]
    assert answer == "29 30 31 -> 0"


def test_accelerate_has_the_losses_of_one_process_with_the_whole_batch(
    run_example: Run, call_plainly: Call
) -> None:
    losses, right = run_example("accelerate_loop")[-2:]

    expected, expected_right, sequences = call_plainly("accelerate_loop", "train", 8, 32)
    assert [float(text) for text in losses.split()[1:]] == pytest.approx(expected, abs=1e-3)
    assert expected[-1] < expected[0] / 1.5
    assert sequences == 101  # not a multiple of what the workers take at a time
    assert right == f"correct: {expected_right} of 101"
