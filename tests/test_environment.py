"""Which variables reach workers, and from where."""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none
import pytest
import ray

import torchrunx_ray as trx
from tests import processes
from torchrunx_ray.agent.keeper import Keeper
from torchrunx_ray.agent.template_environment import search_path, template_environment
from torchrunx_ray.driver.call.template_wanted import template_wanted
from torchrunx_ray.wire import environment


def seen(launcher: trx.Launcher, *names: str) -> list[str | None]:
    def look() -> list[str | None]:
        return [os.environ.get(name) for name in names]

    return launcher.run(look).rank(0)


@pytest.fixture
def launcher(cluster: None) -> trx.Launcher:
    return trx.Launcher(workers_per_host=1, linger=5)


@pytest.mark.parametrize("in_session", [False, True])
def test_launch_that_waits_starts_as_its_driver_was_when_it_was_submitted(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_session: bool
) -> None:
    launcher = trx.Launcher(
        hostnames=1,
        workers_per_host=1,
        cpus_per_worker=ray.cluster_resources()["CPU"],
        backend=None,
        preload=(),
        extra_env_vars=["SEED"],
        linger=0,
    )
    gate = tmp_path / "gate"

    def wait_for_gate() -> None:
        while not gate.exists():
            time.sleep(0.01)

    def look() -> tuple[str, str, list[str]]:
        return os.environ["SEED"], os.getcwd(), sys.argv

    with contextlib.ExitStack() as opened:
        submit = opened.enter_context(launcher.session()).submit if in_session else launcher.submit
        first, runs = submit(wait_for_gate), []
        for seed in ("1", "2"):
            folder = tmp_path / seed
            folder.mkdir()
            monkeypatch.setenv("SEED", seed)
            monkeypatch.setenv("TORCHRUNX_LOG_DIR", f"logs of {seed}")
            monkeypatch.chdir(folder)
            monkeypatch.setattr(sys, "argv", ["train.py", seed])
            runs.append(submit(look))
        monkeypatch.setenv("SEED", "3")
        gate.touch()
        first.result()

        assert [run.result().rank(0) for run in runs] == [
            (seed, str(tmp_path / seed), ["train.py", seed]) for seed in ("1", "2")
        ]
        for run, seed in zip(runs, ("1", "2"), strict=True):
            assert run.log_directory is not None
            assert run.log_directory.parent == tmp_path / seed / f"logs of {seed}"


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


@pytest.mark.slow
def test_default_patterns_can_be_replaced(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MINE", "1")

    only_mine = dataclasses.replace(launcher, default_env_vars=("MINE",))
    assert seen(only_mine, "MINE", "NCCL_DEBUG") == ["1", None]


def test_variable_that_no_process_can_be_started_with_is_named(
    one: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended in 'Argument list too long', in a traceback of Ray's."""
    monkeypatch.setenv("NCCL_BIG", "x" * 2**22)
    with pytest.raises(ValueError, match="the driver's environment: NCCL_BIG has 4194314 bytes"):
        one.run(os.getpid)
    monkeypatch.delenv("NCCL_BIG")

    (tmp_path / "env").write_text("printf -v OF_FILE '%*s' 4194304 x")
    with pytest.raises(trx.LaunchError, match="OF_FILE, which has 4194304 characters"):
        dataclasses.replace(one, env_file=tmp_path / "env").run(os.getpid)


@pytest.mark.slow
def test_place_and_level_of_log_files_need_no_other_template(
    one: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log folder for each experiment made every launch wait for an import of torch."""

    def template() -> int:
        return one.run(os.getppid).rank(0)

    before = template()
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHRUNX_LOG_LEVEL", "DEBUG")
    assert template() == before

    asking = dataclasses.replace(one, extra_env_vars=["TORCHRUNX_LOG_DIR"])
    assert seen(asking, "TORCHRUNX_LOG_DIR") == [str(tmp_path)]


def test_launch_that_no_warm_template_fits_says_what_differs(
    one: trx.Launcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"extra_env_vars": {"OWN_AGENT_FOR": "differences"}, "preload": ()}
    warm = dataclasses.replace(one, **options)
    folder = warm.run(os.getcwd).rank(0)
    monkeypatch.setenv("NCCL_DEBUG", "a secret")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        dataclasses.replace(warm, preload=("json",)).run(os.getpid)

    (said,) = [text for text in caplog.messages if "no warm template fits" in text]
    assert said.endswith(
        "The most similar one differs in: the driver's variable NCCL_DEBUG; the working directory "
        f"{str(tmp_path)!r} instead of {folder!r}; preload ('json',) instead of ()"
    )


def test_name_that_the_driver_does_not_have_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typo, or a key that was never exported, was dropped silently."""
    monkeypatch.setenv("PRESENT", "")
    for name in ("ABSENT_KEY", "NOT_IN_THE_DRIVER", "OF_DEFAULTS"):
        monkeypatch.delenv(name, raising=False)
    options = trx.Launcher(
        default_env_vars=("OF_DEFAULTS",),
        extra_env_vars=("PRESENT", "ABSENT_KEY", "NONE_LIKE_*", "NOT_IN_THE_DRIVER", "ABSENT_KEY="),
    )
    for _ in range(2):
        template_wanted(options)

    assert caplog.messages == [
        "extra_env_vars: the driver has no variable NOT_IN_THE_DRIVER to send. Workers have this variable "
        "only if their host or env_file sets it. Set it in the driver, or give its value: "
        "'NOT_IN_THE_DRIVER=...'."
    ]


@pytest.mark.parametrize("extra", [("A=1", "B=x=y", "C="), {"A": "1", "B": "x=y", "C": ""}])
def test_values_can_be_given(launcher: trx.Launcher, extra: Any) -> None:
    assert seen(dataclasses.replace(launcher, extra_env_vars=extra), "A", "B", "C") == [
        "1",
        "x=y",
        "",
    ]


@pytest.mark.slow
def test_variables_of_the_launch_are_never_copied(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "77")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("RAY_JOB_ID", "5")

    greedy = dataclasses.replace(launcher, extra_env_vars=("*",))
    assert seen(greedy, "RANK", "CUDA_VISIBLE_DEVICES", "RAY_JOB_ID") == ["0", "", None]


@pytest.mark.slow
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


@pytest.mark.slow
def test_relative_env_file_is_in_the_functions_folder(
    launcher: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "env").write_text("A=here")
    monkeypatch.chdir(tmp_path)

    assert seen(dataclasses.replace(launcher, env_file="env"), "A") == ["here"]


@pytest.mark.slow
def test_env_file_that_leaves_something_behind_is_not_waited_for(
    cluster: None, tmp_path: Path
) -> None:
    """It held the pipe of bash's stderr: "bash did not finish sourcing the file within 60 s"."""
    (tmp_path / "env").write_text(f"sleep 1000 & echo $! > {tmp_path}/pid\nexport A=1\n")
    launcher = trx.Launcher(workers_per_host=1, backend=None, env_file=tmp_path / "env", linger=0)
    begun = time.monotonic()

    assert launcher.run(os.getenv, "A").rank(0) == "1"
    assert time.monotonic() - begun < 30
    assert not processes.is_alive(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_env_file_that_was_corrected_is_read_again(cluster: None, tmp_path: Path) -> None:
    """The first reading, or its error, stayed with the agent."""
    env_file = tmp_path / "env"
    launcher = trx.Launcher(workers_per_host=1, env_file=env_file)
    seen: list[str] = []
    for text in ("no_such_command", "export A=1", "export A=22"):
        env_file.write_text(text)
        try:
            seen.append(launcher.run(lambda: os.environ["A"]).rank(0))
        except trx.LaunchError:
            seen.append("error")

    assert seen == ["error", "1", "22"]


def test_env_file_that_exits_is_an_error(cluster: None, tmp_path: Path) -> None:
    """All of its variables were dropped in silence."""
    (tmp_path / "env").write_text("export A=1\nexit 0\n")

    with pytest.raises(trx.LaunchError, match="use return, not exit"):
        trx.Launcher(workers_per_host=1, env_file=tmp_path / "env").run(os.getpid)


@pytest.mark.slow
def test_env_file_whose_last_line_is_a_condition_is_no_error(cluster: None, tmp_path: Path) -> None:
    """Its exit code was taken for one."""
    (tmp_path / "env").write_text("export A=1\n[ -f /nowhere ] && export B=1\n")

    launcher = trx.Launcher(workers_per_host=1, env_file=tmp_path / "env")
    assert launcher.run(lambda: os.environ["A"]).rank(0) == "1"


def test_env_file_that_blocks_does_not_hold_a_cancel(cluster: None, tmp_path: Path) -> None:
    """The agent's constructor waited for bash, and whoever wanted to end the agent for it."""
    (tmp_path / "env").write_text("sleep 30")
    launcher = trx.Launcher(workers_per_host=1, linger=0, env_file=tmp_path / "env")
    run = launcher.submit(os.getpid)
    assert processes.wait_until(lambda: bool(sleeping_bash(tmp_path)), 20)
    run.cancel()

    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=20)
    for pid in sleeping_bash(tmp_path):
        os.kill(pid, signal.SIGKILL)


def sleeping_bash(folder: Path) -> list[int]:
    return [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit()
        and processes.is_alive(int(entry))
        and str(folder) in processes.command_line(int(entry))
        and processes.command_line(int(entry)).startswith("bash")
    ]


def test_paths_go_only_where_the_interpreter_is_the_drivers() -> None:
    own = {"PATH": "/agent", "HOME": "/root", "RAY_JOB_ID": "1", "OMP_NUM_THREADS": "1"}
    drivers = {"PATH": "/driver", "PYTHONPATH": "/src", "NCCL_DEBUG": "INFO"}

    same = environment.for_template(own, drivers, same_interpreter=True)
    other = environment.for_template(own, drivers, same_interpreter=False)

    assert same == {"HOME": "/root", **drivers}
    assert other == {"HOME": "/root", "PATH": "/agent", "NCCL_DEBUG": "INFO"}


@pytest.mark.slow
def test_folders_of_pythonpath_are_searched_as_by_any_python(
    one: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`PYTHONPATH=src python go.py` failed on every Ray that another process had started."""
    source = tmp_path / "src"
    source.mkdir()
    (source / "of_src.py").write_text("def train(): return __file__")
    (source / "given.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(source)
    train = importlib.import_module("of_src").train

    def import_given() -> bool:
        path = [*sys.path]
        importlib.import_module("given")
        return path.index(str(source)) < path.index(sysconfig.get_path("stdlib"))

    giving = dataclasses.replace(one, extra_env_vars={"PYTHONPATH": "src"}, start_method="spawn")
    assert giving.run(import_given).rank(0)

    monkeypatch.setenv("PYTHONPATH", "src")
    assert one.run(train).rank(0) == str(source / "of_src.py")


def test_pythonpath_of_another_interpreter_hides_nothing_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/shared/src:own")
    wanted = dataclasses.replace(template_wanted(trx.Launcher()), driver_executable="/other")

    assert search_path(wanted, {}, "/here", {}) == [*sys.path, "/shared/src", "/here/own"]
    same = dataclasses.replace(wanted, driver_executable=sys.executable)
    assert search_path(same, {}, "/here", {}) == sys.path


@pytest.mark.parametrize(
    ("of_host", "of_driver", "found"),
    [
        ("/lib", "/src:/lib", ["/agent", "/src", "/lib", "STANDARD"]),
        ("/lib", "/src", ["/agent", "/src", "/lib", "STANDARD"]),
        ("/lib:/more", "/more:/lib", ["/agent", "/more", "/lib", "STANDARD"]),
        ("", "/src:/agent", ["/agent", "/src", "STANDARD"]),
    ],
)
def test_folders_of_pythonpath_keep_the_drivers_order(
    monkeypatch: pytest.MonkeyPatch, of_host: str, of_driver: str, found: list[str]
) -> None:
    standard = sysconfig.get_path("stdlib")
    agents = ["/agent", *filter(None, of_host.split(":")), standard]
    monkeypatch.setattr(sys, "path", agents)
    monkeypatch.setenv("PYTHONPATH", of_host)
    wanted = template_wanted(trx.Launcher())

    searched = search_path(wanted, {"PYTHONPATH": of_driver}, "/here", {})

    assert searched == [standard if each == "STANDARD" else each for each in found]


def test_env_file_may_use_every_name(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("env=prod\neach=1\nvalue=2\nIFS=01,\n")
    wanted = template_wanted(trx.Launcher(env_file=tmp_path / "env"))
    made = template_environment(wanted, "", "/")
    assert (made["env"], made["each"], made["value"]) == ("prod", "1", "2")

    with (tmp_path / "env").open("a") as file:
        file.write("printf -v OF_FILE '%*s' 4194304 x")
    with pytest.raises(ValueError, match="OF_FILE, which has 4194304 characters"):
        template_environment(wanted, "", "/")


def test_variables_that_are_too_large_together_are_named(one: trx.Launcher) -> None:
    large = {f"LARGE_{i}": "x" * (119_000 + i) for i in range(25)}

    with pytest.raises(
        trx.LaunchError,
        match=r"all variables together have \d{7} bytes.* LARGE_24 \(\d+\), LARGE_23 \(",
    ):
        dataclasses.replace(one, extra_env_vars=large).run(os.getpid)


def test_keeper_that_cannot_be_started_leaves_no_pipe() -> None:
    def pipes() -> list[str]:
        opened = Path("/proc/self/fd").iterdir()
        links = [os.readlink(each) for each in opened if each.is_symlink()]
        return sorted(link for link in links if link.startswith("pipe:"))

    wanted = template_wanted(trx.Launcher())
    before = pipes()

    with pytest.raises(FileNotFoundError):
        Keeper({}, "/no/such/folder", wanted, {})

    assert pipes() == before


def notes(run: Callable[[], object]) -> str:
    with pytest.raises((KeyError, ImportError)) as caught:
        run()
    return "\n".join(caught.value.__notes__)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_variable_that_did_not_travel_is_told_of_where_it_is_missed(
    one: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_VAR", "of the driver")

    def look_up(where: str) -> str:
        return (os.environ if where == "environ" else dict[str, str]())["MY_VAR"]

    assert 'extra_env_vars=["MY_VAR"]' in notes(lambda: one.run(look_up, "environ"))
    assert "MY_VAR" not in notes(lambda: one.run(look_up, "dict"))
    sending_all = dataclasses.replace(one, extra_env_vars="all")
    assert sending_all.run(look_up, "environ").rank(0) == "of the driver"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_module_that_a_worker_lacks_is_told_of_with_the_drivers_own_path(
    one: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice was working_dir "." for every layout, also when that had been followed."""
    package = tmp_path / "src" / "of_driver"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(package.parent)

    def fail(kind: type[ImportError], name: str, path: str | None = None) -> None:
        raise kind("missing", name=name, path=path)

    told = notes(lambda: one.run(importlib.import_module, "of_driver"))
    assert (
        f"The driver has of_driver in {package}. If the hosts have that folder, run PYTHONPATH={package.parent}"
    ) in told
    assert (
        "To send the code instead, call before the launch: ray.init(runtime_env="
        f"{{'py_modules': ['{package}']}}), or use {{'working_dir': '{package.parent}'}}"
    ) in told
    installed = notes(lambda: one.run(fail, ModuleNotFoundError, "cloudpickle.deep"))
    assert f"The driver has cloudpickle installed, in {cloudpickle.__path__[0]}." in installed
    other = notes(lambda: one.run(fail, ImportError, "of_driver", "/old/of_driver/__init__.py"))
    assert f"in /old/of_driver/__init__.py, and the driver has it in {package}." in other
    monkeypatch.setenv("PYTHONPATH", "src")
    searched = notes(lambda: one.run(fail, ModuleNotFoundError, "of_driver"))
    assert "That folder is in the driver's PYTHONPATH. Workers search it too" in searched


@pytest.mark.exhaustive
def test_advice_never_takes_the_place_of_the_workers_error(
    one: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "that_breaks_a_finder":
                raise RuntimeError("of a finder")

    def fail(name: object) -> None:
        raise ModuleNotFoundError(f"no module {name}", name=name)

    (tmp_path / "of_cwd.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)

    for name in (5, "that_breaks_a_finder"):
        assert "Raised by rank 0" in notes(lambda name=name: one.run(fail, name))
    told = notes(lambda: one.run(fail, "of_cwd"))
    assert f"The driver has of_cwd in {tmp_path / 'of_cwd.py'}. If the hosts have that" in told


@pytest.mark.slow
@pytest.mark.exhaustive
def test_workers_of_different_environments_do_not_share_agents(launcher: trx.Launcher) -> None:
    values = [
        seen(dataclasses.replace(launcher, extra_env_vars={"A": value}), "A")
        for value in ("1", "2", "1")
    ]

    assert values == [["1"], ["2"], ["1"]]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_a_runtime_env_brings_is_not_hidden_by_the_drivers_pythonpath(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], address: str, tmp_path: Path
) -> None:
    """A host's old copy ran in place of the code that the driver had sent, in workers or their children."""
    for folder, of in (("job", "job"), ("given", "env_vars"), ("mods/of_py_modules", "py_modules")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").write_text(f"of = {of!r}")
        (tmp_path / folder / f"in_{folder[:3]}.py").write_text(f"of = {of!r}")
    stale = tmp_path / "stale"
    (stale / "of_py_modules").mkdir(parents=True)
    for name in ("in_job.py", "in_giv.py", "of_py_modules/__init__.py", "only_there.py"):
        (stale / name).write_text("of = 'an old copy'")
    (tmp_path / "job" / "data.txt").write_text("of the job")
    done = run_script(
        f'''
import os, subprocess, sys
ray.shutdown()
folder = {str(tmp_path)!r}
job = {{"working_dir": folder + "/job", "py_modules": [folder + "/mods/of_py_modules"]}}
job["env_vars"] = {{"PYTHONPATH": folder + "/given"}}
ray.init({address!r}, runtime_env=job)
os.environ["PYTHONPATH"] = folder + "/stale"
import torchrunx_ray as trx

CHILD = """
import in_giv, in_job, of_py_modules, only_there
print(in_job.of, of_py_modules.of, in_giv.of, only_there.of, sep=", ")
"""

def look():
    import in_giv, in_job, of_py_modules, only_there
    modules = in_job, of_py_modules, in_giv, only_there
    in_child = subprocess.check_output([sys.executable, "-c", CHILD], cwd="/", text=True)
    return open("data.txt").read(), ", ".join(module.of for module in modules), in_child

print(*trx.launch(look, workers_per_host=1, backend=None).rank(0), sep="\\n")
'''
    )

    found = "job, py_modules, env_vars, an old copy\n"
    assert done.stdout == f"of the job\n{found}{found}\n", done.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_threads_that_ray_gives_a_task_are_not_the_workers(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=1, backend=None)

    def launch_in_task(own: str | None) -> tuple[str, str | None]:
        if own is not None:
            os.environ["OMP_NUM_THREADS"] = own
        return os.environ["OMP_NUM_THREADS"], launcher.run(os.getenv, "OMP_NUM_THREADS").rank(0)

    task: Any = ray.remote(num_cpus=2)(launch_in_task)
    assert ray.get(task.remote(None)) == ("2", None)
    assert ray.get(task.options(num_cpus=3).remote("5")) == ("5", "5")


@pytest.mark.slow
def test_what_an_env_file_leaves_outside_of_its_group_is_ended(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    """As ssh-agent does."""
    env_file = tmp_path / "env.sh"
    left = tmp_path / "left"
    env_file.write_text(
        f"LEFT=4321 setsid sh -c 'touch {left}; exec sleep 4321' > /dev/null 2>&1 &\n"
        f"while [ ! -e {left} ]; do sleep 0.01; done\n"
    )
    launcher = dataclasses.replace(launcher, env_file=env_file, linger=0)
    launcher.run(os.getpid)

    assert not processes.mentioning("LEFT=4321")


def test_what_torchrun_set_for_the_driver_stays_there(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would take no rank for the master of a store that the function makes."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/error.json")

    store, error_file = seen(launcher, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE")
    assert store is None
    assert error_file != "/tmp/error.json"


def test_what_the_launch_sets_is_refused_in_an_env_file(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("RANK=1\n")
    wanted = template_wanted(trx.Launcher(env_file=tmp_path / "env"))

    with pytest.raises(ValueError, match=r"env' sets RANK, which the launch itself sets"):
        template_environment(wanted, "", "/")


def test_host_without_bash_for_an_env_file_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told as a template that could not be started."""
    (tmp_path / "env").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = template_wanted(trx.Launcher(env_file=tmp_path / "env"))

    with pytest.raises(ValueError, match=rf"env_file='{tmp_path}/env': bash.* PATH .*{tmp_path}"):
        template_environment(wanted, "", "/")


@pytest.mark.parametrize("what", ["search_path", "Channel.send"])
def test_template_that_cannot_be_set_up_leaves_neither_process_nor_descriptor(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("out of files")

    def left() -> tuple[int, int]:
        children = (path.read_text() for path in Path("/proc/self/task").glob("*/children"))
        return len("".join(children).split()), len(os.listdir("/proc/self/fd"))

    wanted = template_wanted(trx.Launcher())
    monkeypatch.setattr(f"torchrunx_ray.agent.keeper.{what}", fail)
    times = 20  # more than other threads may open or close meanwhile
    before = left()
    for _ in range(times):
        with pytest.raises(OSError, match="out of files"):
            Keeper(dict(os.environ), "/", wanted, {})

    assert all(after < then + times for after, then in zip(left(), before, strict=True))
