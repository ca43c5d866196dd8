"""torchrun's own main function, with our agent in the place of torch's: scripts, modules, programs, settings."""

import os
from pathlib import Path

import pytest
from torch.distributed import run as torchrun
from torch.distributed.launcher import api as launcher_api

from tests.elastic import free_port
from torchrunx_ray.elastic import RayElasticAgent

SCRIPT = """
import os, sys
from pathlib import Path

Path(sys.argv[1], f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}").touch()
"""

PROGRAM = """#!/bin/bash
touch "$1/$RANK of $WORLD_SIZE"
"""

GROUP = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist

folder, method = sys.argv[1:]
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if method == "env":
    dist.init_process_group("gloo")
else:
    address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
total = torch.tensor(rank)
dist.all_reduce(total)
Path(folder, f"sum {int(total)} on {rank}").touch()
"""


@pytest.fixture
def folder(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the scripts, in which torchrun runs."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "group.py").write_text(GROUP)
    (tmp_path / "program.sh").write_text(PROGRAM)
    (tmp_path / "program.sh").chmod(0o755)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher_api, "LocalElasticAgent", RayElasticAgent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Workers get all variables, and another name of a test would mean another template.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    return tmp_path


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["script.py"], id="a script"),
        pytest.param(["-m", "script"], id="a module"),
        pytest.param(["--no-python", "./program.sh"], id="a program"),
        pytest.param(["--run-path", "script.py"], id="a script in the worker itself"),
    ],
)
def test_each_kind_of_program_runs(folder: Path, arguments: list[str]) -> None:
    torchrun.main(
        ["--nproc-per-node=2", "--rdzv-backend=ray", "--monitor-interval=0.1", *arguments, "out"]
    )

    assert made(folder) == ["0 of 2", "1 of 2"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--standalone"], id="standalone"),
        pytest.param(["--master-addr=localhost", "--master-port={port}"], id="static"),
        pytest.param(["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:{port}"], id="c10d"),
        pytest.param(["--rdzv-backend=ray", "--nnodes=1:1", "--rdzv-id=x"], id="ray"),
    ],
)
def test_each_rendezvous_works(folder: Path, options: list[str]) -> None:
    port = free_port()
    given = [option.format(port=port) for option in options]

    torchrun.main(["--nproc-per-node=2", "--monitor-interval=0.1", *given, "script.py", "out"])

    assert made(folder) == ["0 of 2", "1 of 2"]


def test_settings_come_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"NPROC_PER_NODE": "2", "RDZV_BACKEND": "ray", "MONITOR_INTERVAL": "0.1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PET_{name}", value)

    torchrun.main(["script.py", "out"])

    assert made(folder) == ["0 of 2", "1 of 2"]


@pytest.mark.parametrize("method", ["env", pytest.param("tcp", marks=pytest.mark.exhaustive)])
def test_script_forms_its_group(folder: Path, method: str) -> None:
    torchrun.main(
        [
            "--nproc-per-node=2",
            "--rdzv-backend=ray",
            "--monitor-interval=0.1",
            "group.py",
            "out",
            method,
        ]
    )

    assert made(folder) == ["sum 1 on 0", "sum 1 on 1"]


def test_output_goes_to_the_log_directory(folder: Path) -> None:
    (folder / "speak.py").write_text("import os\nprint('said by', os.environ['RANK'])\n")
    options = ["--log-dir=logs", "--redirects=3", "--monitor-interval=0.1"]

    torchrun.main(["--nproc-per-node=2", "--rdzv-backend=ray", *options, "speak.py"])

    said = [path.read_text() for path in sorted(folder.glob("logs/*/attempt_0/*/stdout.log"))]
    assert said == ["said by 0\n", "said by 1\n"]
