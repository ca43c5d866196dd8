"""A run is what people expect of a Future."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import os
import threading
import time
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.processes import wait_until


@pytest.fixture
def one(cluster: None) -> trx.Launcher:
    return trx.Launcher(workers_per_host=1, backend=None)


def fail() -> None:
    raise ZeroDivisionError("on purpose")


def wait_for(gate: Path) -> str:
    assert wait_until(gate.exists, 60)
    return gate.name


def test_exception_is_what_result_would_raise(one: trx.Launcher) -> None:
    failed, well, cancelled = one.submit(fail), one.submit(os.getpid), one.submit(time.sleep, 1000)
    cancelled.cancel()

    error = failed.exception(timeout=60)
    assert isinstance(error, ZeroDivisionError)
    assert isinstance(error.__cause__, trx.RemoteFailure)
    with pytest.raises(ZeroDivisionError) as caught:
        failed.result()
    assert caught.value is error
    assert well.exception() is None
    with pytest.raises(concurrent.futures.CancelledError, match=f"{cancelled.name} was cancelled"):
        cancelled.exception()


def test_exception_waits_no_longer_than_told(one: trx.Launcher, tmp_path: Path) -> None:
    run = one.submit(wait_for, tmp_path / "gate")
    with pytest.raises(TimeoutError, match=r"the run continues after 0\.1 s"):
        run.exception(timeout=0.1)
    (tmp_path / "gate").touch()
    assert run.exception() is None


def test_waiting_for_several_runs_gives_them_as_they_end(one: trx.Launcher, tmp_path: Path) -> None:
    first, second = (one.submit(wait_for, tmp_path / name) for name in ("first", "second"))
    (tmp_path / "second").touch()
    done, going_on = concurrent.futures.wait(
        [first, second], 60, return_when=concurrent.futures.FIRST_COMPLETED
    )
    assert (done, going_on) == ({second}, {first})

    completed = concurrent.futures.as_completed([first, second], timeout=60)
    assert next(completed) is second
    (tmp_path / "first").touch()
    assert next(completed).result().rank(0) == "first"


def test_waiting_for_several_runs_hears_of_failures_and_cancellations(one: trx.Launcher) -> None:
    sleeping, failing = one.submit(time.sleep, 1000), one.submit(fail)
    done, _ = concurrent.futures.wait(
        [sleeping, failing], 60, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    assert done == {failing}
    assert isinstance(failing.exception(), ZeroDivisionError)
    sleeping.cancel()
    assert set(concurrent.futures.as_completed([sleeping, failing], 60)) == {sleeping, failing}
    assert sleeping.cancelled()
    assert not failing.cancelled()


def test_handler_of_the_drivers_that_fails_keeps_no_run_from_ending(
    one: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    """The run logs at DEBUG what ended it."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "ended with this error" in record.getMessage():
                said.set()
                raise ValueError("a handler of the driver's")

    said, broken = threading.Event(), Broken()
    ours = logging.getLogger("torchrunx_ray")
    ours.addHandler(broken)
    try:
        with caplog.at_level(logging.DEBUG, "torchrunx_ray"):
            run = dataclasses.replace(one, hostnames=["nowhere"]).submit(os.getpid)
            with pytest.raises(trx.PlacementError, match="nowhere"):
                run.result(timeout=20)
            assert said.wait(20)
    finally:
        ours.removeHandler(broken)


def test_callbacks_are_called_with_the_run_and_may_launch(one: trx.Launcher) -> None:
    """They may block: no other run waits for them."""
    heard: list[object] = []
    called = threading.Event()

    def launch_next(run: "concurrent.futures.Future[trx.LaunchResult[str]]") -> None:
        heard.append(run)
        heard.append(one.run(lambda: "next").rank(0))
        called.set()

    run = one.submit(lambda: "first")
    run.add_done_callback(lambda _: 1 // 0)  # is logged, and hinders no other
    run.add_done_callback(launch_next)
    assert called.wait(60)
    assert heard == [run, "next"]
    run.add_done_callback(heard.append)
    assert heard[-1] is run


def test_cancelled_run_calls_its_callbacks(one: trx.Launcher) -> None:
    called = threading.Event()
    run = one.submit(time.sleep, 1000)
    run.add_done_callback(lambda run: run.cancelled() and called.set())
    run.cancel()
    assert called.wait(60)


def test_run_says_its_name_and_whether_it_is_running(one: trx.Launcher, tmp_path: Path) -> None:
    run = one.submit(wait_for, tmp_path / "gate")
    assert run.name.startswith("wait_for-")
    assert run.name in repr(run)
    assert wait_until(run.running, 60)
    assert not run.done()
    (tmp_path / "gate").touch()
    run.wait()
    assert not run.running()


async def test_asyncio_wraps_a_run_as_any_future(one: trx.Launcher) -> None:
    result = await asyncio.wrap_future(one.submit(lambda: "well"))
    assert list(result) == ["well"]
    with pytest.raises(ZeroDivisionError):
        await asyncio.wrap_future(one.submit(fail))
