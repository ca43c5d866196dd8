"""What torch itself brings for training gives under a launch what it gives in one process."""

import re
import shutil
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

Run = Callable[[str], list[str]]
Load = Callable[[str], ModuleType]


def test_ddp_has_the_losses_of_one_process_with_the_whole_batch(
    run_example: Run, load_example: Load
) -> None:
    losses = [float(line.split()[-1]) for line in run_example("ddp")]

    example = load_example("ddp")
    points, within = example.make_dataset().tensors
    model = example.make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    expected = []
    for epoch in range(8):
        order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch))
        of_batches = []
        for batch in order.split(32):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                model(points[batch]), within[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            of_batches.append(loss.item())
        expected.append(sum(of_batches) / len(of_batches))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.05


def test_fsdp_checkpoint_of_two_workers_is_loaded_by_three(
    run_example: Run, load_example: Load
) -> None:
    two, three, parameters, optimizer_state = run_example("fsdp_checkpoint")

    assert parameters == "parameters equal: True"
    assert optimizer_state == "optimizer state equal: True"
    losses = [float(text) for line in (two, three) for text in re.findall(r"\d\.\d{6}", line)]

    x = torch.randn(96, 10, generator=torch.Generator().manual_seed(1))
    y = x.sum(dim=1, keepdim=True).sin()
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Tanh()) for _ in range(3)]
    model = torch.nn.Sequential(*blocks, torch.nn.Linear(10, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    expected = []
    for _ in range(61):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(
        [expected[0], expected[30], expected[30], expected[60]], abs=1e-4
    )
    assert losses[3] < losses[0] / 4


def test_compiled_model_trains_as_the_eager_one(run_example: Run) -> None:
    """With aot_eager where there is no C++ compiler, which inductor needs."""
    backend, *steps, difference = run_example("compile")

    assert backend == f"backend: {'inductor' if shutil.which('c++') else 'aot_eager'}"
    assert len(steps) == 4
    assert float(difference.partition(": ")[2]) < 1e-5


def test_data_loaders_processes_read_every_sample_once(run_example: Run) -> None:
    assert run_example("dataloader") == [
        f"epoch {epoch}: [50, 50] samples, read by 4 processes; each sample once: True"
        for epoch in range(2)
    ]
