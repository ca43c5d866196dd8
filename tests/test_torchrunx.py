"""The drop-in for torchrunx 0.4: its names, its options, and what they become."""

import argparse
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tyro

import torchrunx_ray as trx
import torchrunx_ray.torchrunx as torchrunx
from tests.clusters.raylets import raylets
from tests.scripts import types_in
from torchrunx_ray.torchrunx.integrations.cli import (
    add_torchrunx_argument_group,
    launcher_from_args,
)
from torchrunx_ray.torchrunx.utils import errors, log_handling

COPIED = (
    "PATH",
    "LD_LIBRARY*",
    "LIBRARY_PATH",
    "PYTHON*",
    "CUDA*",
    "TORCH*",
    "PYTORCH*",
    "NCCL*",
)


@pytest.fixture
def launcher(cluster: None) -> torchrunx.Launcher:
    return torchrunx.Launcher(hostnames=["localhost"], workers_per_host=2, backend="gloo")


def test_public_names_are_those_of_torchrunx() -> None:
    assert torchrunx.__all__ == [
        "DEFAULT_ENV_VARS_FOR_COPY",
        "AgentFailedError",
        "LaunchResult",
        "Launcher",
        "WorkerFailedError",
    ]
    for name in torchrunx.__all__:
        assert getattr(torchrunx, name) is not None
    assert torchrunx.__version__.startswith("0.4.")
    assert torchrunx.DEFAULT_ENV_VARS_FOR_COPY == COPIED
    assert log_handling.__all__ == [
        "RedirectHandler",
        "default_handlers",
        "file_handlers",
        "get_handler_filter",
    ]
    assert errors.__all__ == ["AgentFailedError", "ExceptionFromWorker", "WorkerFailedError"]
    with pytest.raises(AttributeError, match="has no attribute 'lunch'"):
        _ = torchrunx.lunch


def test_errors_and_results_are_ours() -> None:
    assert torchrunx.WorkerFailedError is errors.WorkerFailedError is trx.WorkerFailedError
    assert torchrunx.AgentFailedError is errors.AgentFailedError is trx.AgentFailedError
    assert torchrunx.LaunchResult is trx.LaunchResult


def test_importing_it_loads_neither_ray_nor_torch() -> None:
    script = """
import sys
import torchrunx_ray.torchrunx as torchrunx
import torchrunx_ray.torchrunx.integrations.cli
import torchrunx_ray.torchrunx.utils.errors
from torchrunx_ray.torchrunx.utils.log_handling import RedirectHandler
torchrunx.Launcher(["localhost"], 2).set_logging_handlers(None)
print(sorted({"ray", "torch"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


def test_importing_it_makes_the_modules_below_it_known_as_there() -> None:
    """`torchrunx.utils.errors` was an AttributeError unless somebody had imported it."""
    script = """
import torchrunx_ray.torchrunx as torchrunx
print(torchrunx.utils.errors.WorkerFailedError is torchrunx.WorkerFailedError)
print(torchrunx.utils.log_handling.RedirectHandler.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.stdout == "True\nRedirectHandler\n", done.stderr


def test_fields_have_the_order_and_the_defaults_of_torchrunx() -> None:
    assert [
        (field.name, field.default, field.init) for field in dataclasses.fields(torchrunx.Launcher)
    ] == [
        ("hostnames", "auto", True),
        ("workers_per_host", "gpu", True),
        ("ssh_config_file", None, True),
        ("backend", "nccl", True),
        ("worker_timeout", 600, True),
        ("agent_timeout", 60, True),
        ("copy_env_vars", COPIED, True),
        ("extra_env_vars", None, True),
        ("env_file", None, True),
        ("handler_factory", "auto", False),
    ]


def test_attributes_may_be_assigned_before_a_run(launcher: torchrunx.Launcher) -> None:
    launcher.workers_per_host = 3
    launcher.backend = None
    launcher.extra_env_vars = {"ASSIGNED": "late"}

    result = launcher.run(lambda: (os.environ["ASSIGNED"], os.environ["RANK"]))

    assert result.results == {"localhost": [("late", "0"), ("late", "1"), ("late", "2")]}


def test_wrong_values_are_told_at_the_run(launcher: torchrunx.Launcher) -> None:
    launcher.worker_timeout = 0
    with pytest.raises(ValueError, match="timeout=0"):
        launcher.run(os.getpid)
    launcher.worker_timeout = 600
    with pytest.raises(TypeError, match=r"handler_factory=\[\]: expected \"auto\", None, or"):
        launcher.set_logging_handlers([]).run(os.getpid)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="handler_factory returned None: expected a list"):
        launcher.set_logging_handlers(lambda: None).run(os.getpid)  # pyright: ignore[reportArgumentType, reportReturnType]


def test_function_may_be_given_by_name(launcher: torchrunx.Launcher) -> None:
    assert list(launcher.run(func=os.path.join, a="x")) == ["x", "x"]


def test_options_that_mean_nothing_are_told_of_in_one_warning(
    launcher: torchrunx.Launcher,
) -> None:
    launcher.ssh_config_file = "~/.ssh/other"
    launcher.agent_timeout = 5
    with pytest.warns(UserWarning, match="have no effect") as caught:
        launcher.run(os.getpid)

    (warning,) = caught
    assert str(warning.message).startswith(
        "ssh_config_file='~/.ssh/other' and agent_timeout=5 have no effect in torchrunx_ray: Ray"
    )
    assert warning.filename == __file__

    launcher.ssh_config_file, launcher.agent_timeout = None, 60
    with warnings.catch_warnings(record=True) as none:
        launcher.run(os.getpid)
    assert none == []


def test_one_machine_is_localhost_where_nothing_else_is_said(cluster: None) -> None:
    """As there, where "auto" outside of Slurm is ["localhost"]."""
    result = torchrunx.Launcher(workers_per_host=2, backend="gloo").run(os.getpid)

    assert list(result.results) == ["localhost"]
    assert result.index("localhost", 1) == result.rank(1)
    assert result.index(hostname="localhost", local_rank=0) == result.rank(0)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_auto_is_the_whole_cluster() -> None:
    with raylets({"num_cpus": 2}, *2 * [{"num_cpus": 2, "num_gpus": 2}]):
        result = torchrunx.Launcher(backend="gloo").run(
            lambda: (os.environ["RANK"], os.environ["LOCAL_RANK"])
        )
        results = result.results

    assert "localhost" not in results
    assert list(results.values()) == [[("0", "0"), ("1", "1")], [("2", "0"), ("3", "1")]]


def test_default_wants_a_gpu(cluster: None) -> None:
    with pytest.raises(RuntimeError, match=r"workers_per_host='gpu'.* has no GPU"):
        torchrunx.Launcher(hostnames=["localhost"]).run(os.getpid)


def test_workers_may_be_one_per_cpu(cluster: None) -> None:
    launcher = torchrunx.Launcher(["localhost"], "cpu", None, None)

    assert len(launcher.run(os.getpid)) == 8


def test_slurm_outside_of_a_job_is_a_runtime_error(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(RuntimeError, match="outside of a Slurm allocation"):
        torchrunx.Launcher(hostnames="slurm", workers_per_host=1).run(os.getpid)


def test_slurm_takes_the_hosts_of_the_allocation(
    cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho {socket.gethostname()}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")

    result = torchrunx.Launcher("slurm", 2, backend="gloo").run(os.getpid)

    assert list(result.results) == [socket.gethostname()]
    assert len(result) == 2


def test_environment_is_what_was_asked_for(
    launcher: torchrunx.Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OMP_OF_THESE_TESTS", "not in torchrunx's list")
    names = ("HF_HOME", "WANDB_MODE", "EXTRA", "OF_FILE", "OMP_OF_THESE_TESTS")

    def seen() -> list[str | None]:
        return [os.environ.get(name) for name in names]

    assert launcher.run(seen).rank(0) == [None] * 5

    (tmp_path / "train.env").write_text('export OF_FILE="a file"\n')
    launcher.copy_env_vars = (*torchrunx.DEFAULT_ENV_VARS_FOR_COPY, "HF_HOME", "WANDB_*")
    launcher.extra_env_vars = {"EXTRA": "more"}
    launcher.env_file = tmp_path / "train.env"
    assert launcher.run(seen).rank(1) == ["/models", "offline", "more", "a file", None]


def test_workers_have_the_variables_that_torchrunx_sets(launcher: torchrunx.Launcher) -> None:
    names = ("LOCAL_RANK", "RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")

    result = launcher.run(lambda: [os.environ[name] for name in names])

    assert list(result) == [["0", "0", "0", "2", "2"], ["1", "1", "0", "2", "2"]]
    assert launcher.run(lambda: os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"]))


def test_agent_that_dies_is_an_agent_failed_error(launcher: torchrunx.Launcher) -> None:
    def kill_whoever_started_us() -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()

    with pytest.raises(torchrunx.AgentFailedError):
        launcher.run(kill_whoever_started_us)


def parsed(line: str) -> torchrunx.Launcher:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps")
    add_torchrunx_argument_group(parser)
    return launcher_from_args(parser.parse_args(line.split()))


def test_argparse_options_have_the_launchers_defaults() -> None:
    """torchrunx 0.4.0 takes its own default "gpu" for a list, and fails with int("g")."""
    assert parsed("") == torchrunx.Launcher()


def test_argparse_options_become_the_launchers() -> None:
    assert parsed(
        "--hostnames node1 node2 --workers-per-host 8 4 --ssh-config-file ssh --backend gloo "
        "--worker-timeout 60 --agent-timeout 6 --copy-env-vars PATH HF_* --extra-env-vars A=1 B=x=y "
        "--env-file train.env"
    ) == torchrunx.Launcher(
        hostnames=["node1", "node2"],
        workers_per_host=[8, 4],
        ssh_config_file="ssh",
        backend="gloo",
        worker_timeout=60,
        agent_timeout=6,
        copy_env_vars=("PATH", "HF_*"),
        extra_env_vars={"A": "1", "B": "x=y"},
        env_file="train.env",
    )
    words = parsed("--hostnames slurm --workers-per-host cpu --backend None")
    assert words == torchrunx.Launcher("slurm", "cpu", backend=None)
    assert parsed("--hostnames auto --workers-per-host 2") == torchrunx.Launcher("auto", 2)
    assert parsed("--hostnames node1") == torchrunx.Launcher(["node1"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--workers-per-host many", "'many' is not a number, 'gpu' or 'cpu'"),
        ("--extra-env-vars NAME", "'NAME' is not NAME=VALUE"),
        ("--backend smoke", "invalid choice: 'smoke'"),
    ],
)
def test_argparse_refuses_what_cannot_be(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(line)

    assert said in capsys.readouterr().err


def test_argparse_help_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--help")

    assert ended.value.code == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(torchrunx.Launcher):
        assert (f"--{field.name.replace('_', '-')}" in said) is field.init


def test_tyro_makes_a_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    def made(line: str) -> torchrunx.Launcher:
        return tyro.cli(torchrunx.Launcher, args=line.split())

    assert made("") == torchrunx.Launcher()
    assert made("--hostnames auto --workers-per-host gpu") == torchrunx.Launcher()
    assert made("--hostnames a b --workers-per-host 2 4 --backend None") == torchrunx.Launcher(
        ["a", "b"], [2, 4], backend=None
    )
    assert made("--workers-per-host 2 --env-file x --extra-env-vars A 1") == torchrunx.Launcher(
        workers_per_host=2, env_file="x", extra_env_vars={"A": "1"}
    )
    with pytest.raises(SystemExit) as ended:
        made("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(torchrunx.Launcher):
        assert (f"--{field.name.replace('_', '-')}" in said) is field.init


def test_tyro_takes_it_among_a_functions_arguments() -> None:
    def main(launcher: torchrunx.Launcher, batch_size: int) -> tuple[torchrunx.Launcher, int]:
        return launcher, batch_size

    line = "--launcher.hostnames node1 node2 --batch-size 8"
    assert tyro.cli(main, args=line.split()) == (torchrunx.Launcher(["node1", "node2"]), 8)


TYPED = """
import torchrunx_ray.torchrunx as torchrunx

def train(path: str, steps: int = 1) -> float: ...

launcher = torchrunx.Launcher(hostnames=["a"], workers_per_host=2, backend="gloo")
reveal_type(launcher.run(train, "a", steps=2))
reveal_type(launcher.run(train, "a").rank(0))
reveal_type(launcher.set_logging_handlers(None))
launcher.run(train, 3)
launcher.run(train, "a", stepps=2)
torchrunx.Launcher(workers_per_host="many")
"""


@pytest.mark.slow
def test_types_follow_the_function(tmp_path: Path) -> None:
    types, wrong = types_in(TYPED, tmp_path)

    assert types == ['"LaunchResult[float]"', '"float"', '"Launcher"']
    assert wrong == [10, 11, 12]
