"""DeepSpeed finds the process group of the launch and shares its work out over it."""

import shutil
from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.mark.skipif(
    shutil.which("c++") is None,
    reason="DeepSpeed compiles its communication on CPUs with a C++ compiler; there is none here",
)
def test_zero_has_the_losses_of_one_process_with_the_whole_batch(
    run_example: Callable[[str], list[str]], load_example: Callable[[str], ModuleType]
) -> None:
    steps = [line for line in run_example("deepspeed_zero") if line.startswith("step ")]
    losses = [float(line.split()[-1]) for line in steps]

    example = load_example("deepspeed_zero")
    x, y = example.make_data()
    model = example.make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    expected = []
    for _ in range(10):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]
