"""What is wrong is said before anything is left running, in words that help."""

import bdb
import functools
import importlib
import os
import sys
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import torchrunx_ray as trx
from tests import processes
from tests.soon import soon


def takes_two(first: int, second: int = 0) -> None: ...


async def waits() -> None: ...


def gives() -> Iterator[int]:
    yield 1


async def gives_later() -> AsyncIterator[int]:
    yield 1


class Waits:
    async def __call__(self) -> None: ...


def train(data: str, *, learning_rate: float = 0.1) -> None: ...


NOT_CALLED = {"data": "a", "learning_rat": 1}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: trx.launch(takes_two), r"takes_two\(first.*missing a required argument: 'first'"),
        (lambda: trx.launch(takes_two, (1, 2, 3)), "too many positional arguments"),
        (
            lambda: trx.Launcher().run(takes_two, 1, timeout=3),
            "'timeout'; it takes .* Options go into",
        ),  # pyright: ignore[reportCallIssue]
        (lambda: trx.Launcher().submit(functools.partial(takes_two, 1), 2, 3), "too many"),  # pyright: ignore[reportCallIssue]
        (lambda: trx.launch(waits), r"func=waits is an async function.*asyncio.run\(waits"),
        (lambda: trx.launch(Waits()), r"func=Waits is an async function.*asyncio.run\(Waits"),
        (lambda: trx.launch(gives), r"func=gives is a generator function.*list\(gives\(\.\.\.\)"),
        (lambda: trx.launch(functools.partial(gives)), "func=gives is a generator function"),
        (lambda: trx.launch(gives_later), "func=gives_later is an async generator function"),
        (
            lambda: trx.launch(train, func_kwargs=NOT_CALLED),
            r"train has no parameter 'learning_rat'; it takes \(data: str, \*, learning_rate: float "
            r"= 0\.1\)\. Did you mean 'learning_rate'\?$",
        ),
        (
            lambda: trx.launch(train, func_kwargs={"data": "a", "zzz": 1}),
            r"train has no parameter 'zzz'; it takes \(data.*0\.1\)\.$",
        ),
    ],
)
def test_function_that_cannot_be_called_so_is_refused_at_once(
    call: Callable[[], object], said: str
) -> None:
    """The workers found out, behind the wait for room, in a traceback of this package's lines."""
    with pytest.raises(TypeError, match=said):
        call()


@pytest.mark.slow
def test_decorated_function_is_asked_what_its_wrapper_takes(cluster: None) -> None:
    @functools.wraps(takes_two)
    def wrapper() -> str:
        return "well"

    assert trx.launch(wrapper, workers_per_host=1, backend=None).rank(0) == "well"


@pytest.fixture
def nothing_is_asked_of_ray(cluster: None) -> Iterator[None]:
    """No new actor, and no new placement group, however short-lived."""

    def asked() -> tuple[int, int]:
        untyped: Any = ray
        return len(untyped._private.state.actors()), len(ray.util.placement_group_table())

    before = asked()
    yield
    assert asked() == before


def test_function_that_is_not_callable(nothing_is_asked_of_ray: None) -> None:
    not_a_function: Any = 3
    with pytest.raises(TypeError, match="func=3 is not callable; pass the function itself"):
        trx.Launcher().run(not_a_function)


def test_launch_result_and_run_are_refused_with_what_to_pass(launcher: trx.Launcher) -> None:
    """A worker said that the driver had left its cluster; the path led to a lock of the run's."""
    run = launcher.submit(os.getpid)
    result = run.result()
    of_result = "it is a LaunchResult, and only the driver can fetch its values; pass result.ref(i), the reference"
    of_run = "it is a Run, which belongs to the process that started it; pass run.result().ref(i), the reference"
    for launch, path, said in (
        (lambda: launcher.submit(print, [result]), "args[0][0]", of_result),
        (lambda: launcher.submit(lambda: result), "variable 'result' captured by <lambda>", of_result),
        (lambda: launcher.submit(print, run), "args[0]", of_run),
        (lambda: launcher.submit(lambda: run), "variable 'run' captured by <lambda>", of_run),
    ):  # fmt: skip
        with pytest.raises(trx.PayloadError) as caught:
            launch()
        assert str(caught.value).startswith(f"{path} cannot be pickled: {said} to one rank's value")


def test_breakpoint_says_that_a_worker_has_no_stdin(launcher: trx.Launcher) -> None:
    def stop_here() -> None:
        breakpoint()

    with pytest.raises(bdb.BdbQuit) as caught:
        launcher.run(stop_here)

    (note,) = [each for each in caught.value.__notes__ if "no stdin" in each]
    assert "debugpy" in note


def test_debugger_that_has_a_stdin_is_not_told_that_there_is_none(launcher: trx.Launcher) -> None:
    def quit_debugger() -> None:
        readable, _ = os.pipe()
        os.dup2(readable, 0)
        raise bdb.BdbQuit

    with pytest.raises(bdb.BdbQuit) as caught:
        launcher.run(quit_debugger)

    assert not [each for each in caught.value.__notes__ if "stdin" in each]


class Config:
    def __init__(self) -> None:
        self.lock = threading.Lock()


lock_of_this_module = threading.Lock()


def test_argument_that_cannot_be_pickled_is_named_by_its_path(
    nothing_is_asked_of_ray: None,
) -> None:
    with pytest.raises(trx.PayloadError) as caught:
        trx.launch(dict, func_kwargs={"cfg": Config()})

    assert caught.value.path == "kwargs['cfg'].lock"
    assert str(caught.value).startswith("kwargs['cfg'].lock cannot be pickled: TypeError: ")
    assert "Create it inside the function instead" in str(caught.value)


@pytest.mark.parametrize(
    ("args", "path"),
    [
        (([1, {"a": threading.Lock()}],), "args[0][1]['a']"),
        (({threading.Lock()},), "an item of args[0]"),
        ((1, [(lambda: lock_of_this_module)]), "args[1][0]"),
    ],
)
def test_path_leads_through_containers(
    nothing_is_asked_of_ray: None, args: tuple[Any, ...], path: str
) -> None:
    with pytest.raises(trx.PayloadError) as caught:
        trx.launch(print, args)

    assert path in caught.value.path


def test_captured_variable_that_cannot_be_pickled_is_named(nothing_is_asked_of_ray: None) -> None:
    lock = threading.Lock()

    with pytest.raises(trx.PayloadError) as caught:
        trx.launch(lambda: lock)

    assert caught.value.path == "variable 'lock' captured by <lambda>"


def test_return_value_that_cannot_be_pickled_names_rank_and_path(launcher: trx.Launcher) -> None:
    def make_lock() -> dict[str, Any]:
        import threading

        return {"config": [threading.Lock()]}

    with pytest.raises(trx.PayloadError) as caught:
        launcher.run(make_lock)

    assert caught.value.path == "the return value['config'][0]"
    assert caught.value.rank in (0, 1)
    assert f"of rank {caught.value.rank} cannot be pickled on {caught.value.hostname}" in str(
        caught.value
    )


class Poison:
    """Arrives nowhere: unpickling it raises."""

    def __reduce__(self) -> Any:
        return int, ("poison",)


def test_argument_that_cannot_be_unpickled(launcher: trx.Launcher) -> None:
    with pytest.raises(
        trx.PayloadError,
        match=r"cannot be unpickled on .*: ValueError: invalid literal.*\n"
        r"The class's own code raised this error\.",
    ):
        launcher.run(print, Poison())


def test_function_whose_module_the_host_does_not_have(
    launcher: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_the_driver_only.py").write_text("def train(): return 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    train = importlib.import_module("of_the_driver_only").train

    with pytest.raises(trx.PayloadError) as caught:
        launcher.run(train)

    (host,) = launcher.run(os.getpid).hostnames
    assert f"cannot be unpickled on {host}: ModuleNotFoundError: " in str(caught.value)
    where = f"The driver has of_the_driver_only in {tmp_path}/of_the_driver_only.py."
    assert any(note.startswith(where) for note in caught.value.__notes__)


def test_value_whose_module_the_driver_does_not_have(launcher: trx.Launcher) -> None:
    def make() -> object:
        module = types.ModuleType("of_the_workers_only")
        sys.modules[module.__name__] = module
        exec("class Model: pass", module.__dict__)
        return module.Model()

    result = launcher.run(make)

    with pytest.raises(trx.PayloadError, match="Make of_the_workers_only importable in the driver"):
        result.rank(0)


def test_return_value_that_cannot_be_unpickled(launcher: trx.Launcher) -> None:
    result = launcher.run(Poison)

    with pytest.raises(
        trx.PayloadError, match=r"of rank 1 on .* cannot be unpickled on the driver: V"
    ):
        result.rank(1)


def test_backend_that_torch_does_not_have(launcher: trx.Launcher) -> None:
    with pytest.raises(ValueError, match="built without mpi; it has gloo"):
        trx.Launcher(workers_per_host=2, backend="mpi").run(os.getpid)


def test_nccl_without_a_gpu_for_every_worker(cluster: None) -> None:
    with pytest.raises(ValueError, match="backend='nccl' needs a GPU for every worker"):
        trx.Launcher(workers_per_host=2, backend="nccl").run(os.getpid)


def test_nccl_with_two_ranks_on_one_gpu() -> None:
    with pytest.raises(ValueError, match="nccl refuses two ranks on one GPU"):
        trx.Launcher(backend="nccl", gpus_per_worker=0.5)


def run_with_preload(module: str, source: str, folder: Path) -> None:
    """Launch with a preload that lies in a folder of its own."""
    (folder / f"{module}.py").write_text(source)
    trx.Launcher(
        workers_per_host=1,
        linger=0,
        preload=("torch", module),
        runtime_env={"env_vars": {"PYTHONPATH": str(folder)}},
    ).run(os.getpid)


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        (
            "preload_with_error",
            "1 / 0",
            "preload='preload_with_error' cannot be imported: ZeroDivisionError: division by zero",
        ),
        (
            "preload_of_nothing",
            "import no_such_module",
            "preload='preload_of_nothing' cannot be imported: ModuleNotFoundError: No module named "
            "'no_such_module'",
        ),
        (
            "preload_that_exits",
            "raise SystemExit(3)",
            "preload='preload_that_exits' cannot be imported: SystemExit: 3",
        ),
        (
            "preload_with_cuda_by_torch",
            "import torch; torch.cuda._initialized = True",
            "importing preload='preload_with_cuda_by_torch' initialised CUDA",
        ),
        (
            # What cuInit opens; a stand-in, since there is no card here.
            "preload_with_cuda_beside_torch",
            "fd = __import__('os').open('/dev/nvidia-uvm-stand-in', 65)",
            "importing preload='preload_with_cuda_beside_torch' initialised CUDA",
        ),
        (
            "preload_with_openmp",
            "import torch; torch.set_num_threads(2); torch.ones(1 << 22).add_(1).sum()",
            "started an OpenMP thread pool, and forked workers would hang",
        ),
    ],
)
def test_preload_that_cannot_be_forked_from(
    cluster: None, tmp_path: Path, module: str, source: str, said: str
) -> None:
    stand_in = Path("/dev/nvidia-uvm-stand-in")
    try:
        with pytest.raises(trx.PreloadError) as caught:
            run_with_preload(module, source, tmp_path)
    finally:
        stand_in.unlink(missing_ok=True)

    assert isinstance(caught.value, ValueError), "it is an option that is wrong"
    assert said in str(caught.value)
    assert str(caught.value).startswith("On ")
    assert processes.wait_until(lambda: not processes.mentioning(str(tmp_path)))


@pytest.mark.slow
def test_preload_with_threads_that_a_fork_can_live_with(cluster: None, tmp_path: Path) -> None:
    run_with_preload(
        "preload_with_thread",
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        tmp_path,
    )


@pytest.mark.slow
def test_spawned_workers_do_not_mind_a_preload(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=1, start_method="spawn", preload=("no_such_module",))

    assert launcher.run(lambda: "well").rank(0) == "well"


def test_env_file_that_fails_shows_what_bash_said(cluster: None, tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("no_such_command\nfalse\n")

    with pytest.raises(trx.LaunchError) as caught:
        trx.Launcher(workers_per_host=1, env_file=env_file).run(os.getpid)

    assert f"env_file='{env_file}' could not be sourced" in str(caught.value)
    assert "no_such_command: command not found" in str(caught.value)


def test_host_that_is_not_there_is_named_with_those_that_are(cluster: None) -> None:
    with pytest.raises(trx.PlacementError) as caught:
        trx.Launcher(hostnames=["nowhere"]).run(os.getpid)

    (node,) = ray.nodes()
    assert "'nowhere' is not a live node" in str(caught.value)
    assert node["NodeManagerHostname"] in str(caught.value)


def test_more_than_the_cluster_has_fails_at_once_with_the_numbers(cluster: None) -> None:
    with soon(), pytest.raises(trx.PlacementError) as caught:
        trx.Launcher(workers_per_host=1, cpus_per_worker=1000, placement_timeout=60).run(os.getpid)

    assert caught.value.wanted == [{"CPU": 1000}]
    assert next(iter(caught.value.total.values()))["CPU"] == 8
    assert "a host needs 1000 CPU; the largest node has 8" in str(caught.value)
    assert "wanted: 1 x (1000 CPU)" in str(caught.value)
