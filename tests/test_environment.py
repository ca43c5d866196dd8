"""Which variables reach workers, and from where."""

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from torchrunx_ray.wire import environment


def seen(launcher: trx.Launcher, *names: str) -> list[str | None]:
    def look() -> list[str | None]:
        return [os.environ.get(name) for name in names]

    return launcher.run(look).rank(0)


@pytest.fixture
def launcher(cluster: None) -> trx.Launcher:
    return trx.Launcher(workers_per_host=1, linger=5)


def test_drivers_variables_travel_by_default_patterns_and_by_asking(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NCCL_DEBUG", "HF_HOME", "WANDB_PROJECT", "WANDB_MODE", "SECRET"):
        monkeypatch.setenv(name, f"the {name}")
    asking = dataclasses.replace(launcher, extra_env_vars=("WANDB_*",))

    assert seen(launcher, "NCCL_DEBUG", "HF_HOME", "WANDB_MODE") == [
        "the NCCL_DEBUG",
        "the HF_HOME",
        None,
    ]
    assert seen(asking, "WANDB_PROJECT", "WANDB_MODE", "SECRET", "HF_HOME") == [
        "the WANDB_PROJECT",
        "the WANDB_MODE",
        None,
        "the HF_HOME",
    ]


def test_default_patterns_can_be_replaced(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MINE", "1")

    only_mine = dataclasses.replace(launcher, default_env_vars=("MINE",))
    assert seen(only_mine, "MINE", "NCCL_DEBUG") == ["1", None]


@pytest.mark.parametrize("extra", [("A=1", "B=x=y", "C="), {"A": "1", "B": "x=y", "C": ""}])
def test_values_can_be_given(launcher: trx.Launcher, extra: Any) -> None:
    assert seen(dataclasses.replace(launcher, extra_env_vars=extra), "A", "B", "C") == [
        "1",
        "x=y",
        "",
    ]


def test_variables_of_the_launch_are_never_copied(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "77")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("RAY_JOB_ID", "5")

    greedy = dataclasses.replace(launcher, extra_env_vars=("*",))
    assert seen(greedy, "RANK", "CUDA_VISIBLE_DEVICES", "RAY_JOB_ID") == ["0", "", None]


def test_env_file_has_exports_quotes_and_logic(launcher: trx.Launcher, tmp_path: Path) -> None:
    (tmp_path / "env").write_text(
        """
# a comment
PLAIN=1
export EXPORTED="two words"
SINGLE='$PLAIN stays'
JOINED="$PLAIN-$FROM_DRIVER"
if [ "$PLAIN" = 1 ]; then CHOSEN=yes; else CHOSEN=no; fi
MULTI="a
b"
PATH="$PATH:/of/the/file"
echo chatter
"""
    )
    names = ("PLAIN", "EXPORTED", "SINGLE", "JOINED", "CHOSEN", "MULTI", "status")
    both = dataclasses.replace(
        launcher,
        env_file=tmp_path / "env",
        default_env_vars=("FROM_DRIVER", "PATH"),
    )
    os.environ["FROM_DRIVER"] = "driver"
    try:
        values = seen(both, *names, "PATH")
    finally:
        del os.environ["FROM_DRIVER"]

    assert values[:-1] == [
        "1",
        "two words",
        "$PLAIN stays",
        "1-driver",
        "yes",
        "a\nb",
        None,
    ]
    assert values[-1] == os.environ["PATH"] + ":/of/the/file"


def test_env_file_wins_over_copies_and_given_values_win_over_it(
    launcher: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_A", "driver")
    monkeypatch.setenv("NCCL_B", "driver")
    (tmp_path / "env").write_text("NCCL_A=file\nNCCL_B=file\n")
    all_three = dataclasses.replace(
        launcher, env_file=tmp_path / "env", extra_env_vars={"NCCL_B": "given"}
    )

    assert seen(all_three, "NCCL_A", "NCCL_B") == ["file", "given"]


def test_env_file_that_is_missing(launcher: trx.Launcher, tmp_path: Path) -> None:
    missing = dataclasses.replace(launcher, env_file=tmp_path / "none")

    with pytest.raises(trx.LaunchError, match="No such file or directory"):
        seen(missing, "A")


def test_relative_env_file_is_in_the_functions_folder(
    launcher: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "env").write_text("A=here")
    monkeypatch.chdir(tmp_path)

    assert seen(dataclasses.replace(launcher, env_file="env"), "A") == ["here"]


def test_paths_go_only_where_the_interpreter_is_the_drivers() -> None:
    own = {"PATH": "/agent", "HOME": "/root", "RAY_JOB_ID": "1", "OMP_NUM_THREADS": "1"}
    drivers = {"PATH": "/driver", "PYTHONPATH": "/src", "NCCL_DEBUG": "INFO"}

    same = environment.for_template(own, drivers, same_interpreter=True)
    other = environment.for_template(own, drivers, same_interpreter=False)

    assert same == {"HOME": "/root", **drivers}
    assert other == {"HOME": "/root", "PATH": "/agent", "NCCL_DEBUG": "INFO"}


def test_workers_of_different_environments_do_not_share_agents(launcher: trx.Launcher) -> None:
    values = [
        seen(dataclasses.replace(launcher, extra_env_vars={"A": value}), "A")
        for value in ("1", "2", "1")
    ]

    assert values == [["1"], ["2"], ["1"]]


def test_working_dir_and_py_modules_of_a_job(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "data.txt").write_text("of the job")
    (tmp_path / "mods" / "of_py_modules").mkdir(parents=True)
    (tmp_path / "mods" / "of_py_modules" / "__init__.py").write_text("value = 42")
    done = run_script(
        f"""
ray.shutdown()
job = {{"working_dir": {str(tmp_path / "job")!r}, "py_modules": [{str(tmp_path / "mods/of_py_modules")!r}]}}
ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env=job)
import torchrunx_ray as trx

def look():
    import of_py_modules
    return open("data.txt").read(), of_py_modules.value

print(trx.launch(look, workers_per_host=1).rank(0))
"""
    )

    assert done.stdout == "('of the job', 42)\n", done.stderr
