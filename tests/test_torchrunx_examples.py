"""What the documentation of torchrunx 0.4 shows works with its import changed, and nothing else.

The scripts say `import torchrunx`; what changes them is the command in docs/from_torchrunx.md.
They ask for gloo, and for localhost where there they name other machines: there is no GPU here.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DOCS = (Path(__file__).parents[1] / "docs" / "from_torchrunx.md").read_text()

RunMoved = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_moved(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> RunMoved:
    """Run a script that was written for torchrunx, after what the docs say has been done to it."""

    def run_moved(script: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "train.py").write_text(script)
        (command,) = re.findall(r"^sed -i .*$", DOCS, re.M)
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
        moved = (tmp_path / "train.py").read_text()
        assert not re.search(r"\b(import|from) torchrunx\b", moved)
        done = run_script(moved)
        assert done.returncode == 0, done.stderr
        return done

    return run_moved


TRAINING_LOOP = """
import logging
import os

os.environ.pop("TORCHRUNX_LOG_DIR", None)  # these tests have it empty

import torch
import torch.distributed as dist
import torchrunx

logging.basicConfig(level=logging.INFO)


def distributed_training(output_dir: str, num_steps: int = 10) -> str | None:
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for step in range(num_steps):
        optimizer.zero_grad()
        inputs = torch.randn(64, 10)
        loss = torch.nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True))
        loss.backward()
        optimizer.step()
    print(f"rank {rank} has local rank {local_rank} and loss {loss.item():.6f}")
    if rank == 0:
        os.makedirs(output_dir, exist_ok=True)
        checkpoint_path = os.path.join(output_dir, "model.pt")
        torch.save(model.module, checkpoint_path)
        return checkpoint_path
    return None


if __name__ == "__main__":
    launcher = torchrunx.Launcher(
        hostnames=["localhost"],  # or IP addresses
        workers_per_host=2,
        backend="gloo",
    )
    results = launcher.run(distributed_training, output_dir="outputs", num_steps=200)
    checkpoint_path = results.rank(0)
    assert checkpoint_path == results.index(hostname="localhost", local_rank=0)
    assert results.rank(1) is None
    model = torch.load(checkpoint_path, weights_only=False)
    model.eval()
    print(f"{model(torch.ones(1, 10)).item():.1f}")
"""


def test_training_loop_of_the_readme(run_moved: RunMoved, tmp_path: Path) -> None:
    done = run_moved(TRAINING_LOOP)

    assert done.stdout == "10.0\n"
    assert "INFO:torchrunx.localhost.0:rank 0 has local rank 0 and loss 0.0" in done.stderr
    assert "rank 1 has" not in done.stderr
    (directory,) = (tmp_path / "torchrunx_logs").iterdir()
    assert "rank 1 has local rank 1" in (directory / "localhost[1].log").read_text()


SEVERAL_FUNCTIONS = """
import torch
import torch.distributed as dist
import torchrunx as trx


def train(steps=1, model=None):
    model = torch.zeros(3) if model is None else model
    for _ in range(steps):
        change = torch.ones(3)
        dist.all_reduce(change)
        model += change
    return model


def evaluation(model):
    return dist.get_world_size(), model.sum().item()


train_launcher = trx.Launcher(hostnames=["localhost"], workers_per_host=2, backend="gloo")
eval_launcher = trx.Launcher(hostnames=["localhost"], workers_per_host=1, backend="gloo")

pretrained_model = train_launcher.run(train).rank(0)
print(eval_launcher.run(evaluation, model=pretrained_model).rank(0))
finetuned_model = train_launcher.run(train, steps=2, model=pretrained_model).rank(0)
print(eval_launcher.run(evaluation, model=finetuned_model).rank(0))
"""


def test_several_functions_in_one_script(run_moved: RunMoved) -> None:
    assert run_moved(SEVERAL_FUNCTIONS).stdout == "(1, 6.0)\n(1, 18.0)\n"


EXCEPTIONS = """
import os
import signal
from pathlib import Path
import torch
import torch.distributed as dist
import torchrunx


def train(config=None, resume_from_checkpoint=False):
    if config == "large" and os.environ["RANK"] == "1":
        raise torch.cuda.OutOfMemoryError("as on a GPU")
    if resume_from_checkpoint and os.environ["RANK"] == "0" and not Path("checkpoint").exists():
        Path("checkpoint").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def launcher():
    return torchrunx.Launcher(workers_per_host=2, backend="gloo")


for config in ("small", "large", "medium"):
    try:
        launcher().run(train, config)
        print(f"{config} fits")
    except torch.cuda.OutOfMemoryError as error:
        print(f"{config} results in OOM on rank {error.__cause__.rank}... continuing...")

for retry in range(3):
    try:
        launcher().run(train, resume_from_checkpoint=True)
    except torchrunx.WorkerFailedError as e:
        print(f"Error occurred: {'SIGKILL' in str(e)}")
    else:
        print(f"done at retry {retry}")
        break
"""


def test_exceptions_are_caught_as_what_they_are(run_moved: RunMoved) -> None:
    assert run_moved(EXCEPTIONS).stdout.splitlines() == [
        "small fits",
        "large results in OOM on rank 1... continuing...",
        "medium fits",
        "Error occurred: True",
        "done at retry 1",
    ]


LOGGING = """
import logging
import sys
import torchrunx
from torchrunx.utils.log_handling import RedirectHandler, get_handler_filter

hostnames = ["localhost"]


def custom_handlers() -> list[logging.Handler]:
    redirect_handler = RedirectHandler()
    redirect_handler.addFilter(get_handler_filter(
        hostname=hostnames[0], local_rank=1, log_level=logging.DEBUG
    ))
    file_handler = logging.FileHandler("output.txt")
    file_handler.addFilter(get_handler_filter(
        hostname=hostnames[0], local_rank=0, log_level=logging.DEBUG
    ))
    return [redirect_handler, file_handler]


def distributed_function():
    logging.getLogger("transformers").setLevel(logging.DEBUG)
    logging.getLogger("transformers").debug("loading")
    logger = logging.getLogger("my_app")
    logger.info("Hello world!")
    print("printed")


launcher = torchrunx.Launcher(hostnames, 2, None, "gloo")
launcher.run(distributed_function)  # as there, the root logger's level hides what is INFO
logging.basicConfig(level=logging.INFO)
logging.getLogger("torchrunx").setLevel(logging.DEBUG)
logging.getLogger("torchrunx.localhost.1").setLevel(logging.INFO)
launcher.set_logging_handlers(custom_handlers).run(distributed_function)
"""


def test_custom_logging(run_moved: RunMoved, tmp_path: Path) -> None:
    done = run_moved(LOGGING)

    assert done.stdout == ""
    shown = [line for line in done.stderr.splitlines() if "torchrunx." in line]
    assert sorted(shown) == [
        "INFO:torchrunx.localhost.1:my_app:Hello world!",
        "INFO:torchrunx.localhost.1:printed",
    ]
    written = (tmp_path / "output.txt").read_text().splitlines()
    assert sorted(written) == ["my_app:Hello world!", "printed", "transformers:loading"]


COMMAND_LINE = """
import argparse
import os
import tyro
import torchrunx
from torchrunx.integrations.cli import add_torchrunx_argument_group, launcher_from_args

parser = argparse.ArgumentParser()
add_torchrunx_argument_group(parser)
args = parser.parse_args("--hostnames localhost --workers-per-host 2 --backend gloo".split())
print(list(launcher_from_args(args).run(lambda: os.environ["RANK"])))

line = "--hostnames localhost --workers-per-host 3 --backend None --extra-env-vars NAME value"
launcher = tyro.cli(torchrunx.Launcher, args=line.split())
print(launcher.run(lambda: os.environ["NAME"]).results)
"""


def test_options_from_a_command_line(run_moved: RunMoved) -> None:
    assert run_moved(COMMAND_LINE).stdout.splitlines() == [
        "['0', '1']",
        "{'localhost': ['value', 'value', 'value']}",
    ]


UNCONFIGURED = """
import sys
import torchrunx

def speak():
    print("to stdout")
    print("to stderr", file=sys.stderr)

torchrunx.Launcher(workers_per_host=2, backend=None).run(speak)
"""


def test_script_that_configures_no_logging_sees_errors_only(run_moved: RunMoved) -> None:
    """As there: a logger without handlers shows what is a WARNING or more, and stderr is ERROR."""
    done = run_moved(UNCONFIGURED)

    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "to std" in line]
    assert said == ["to stderr"]
