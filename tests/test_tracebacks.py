"""What a user sees of this package in a traceback."""

import asyncio
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

import torchrunx_ray as trx

ONE = trx.Launcher(workers_per_host=1, backend=None)


def fail() -> None:
    raise ZeroDivisionError


def in_a_session() -> None:
    with ONE.session() as session:
        session.run(fail)


async def awaited() -> None:
    await ONE.submit(fail)


def returned() -> None:
    ONE.run(lambda: threading.Lock())


def twice() -> None:
    run = ONE.submit(fail)
    with pytest.raises(ZeroDivisionError):
        run.result()
    run.result()


def asked(timeout: Any) -> None:
    run = ONE.submit(int)
    try:
        run.result(timeout)
    finally:
        run.wait()


RAISED: dict[str, tuple[type[BaseException], Callable[[], object]]] = {
    "function": (ZeroDivisionError, lambda: trx.launch(fail, workers_per_host=1, backend=None)),
    "run": (ZeroDivisionError, lambda: ONE.run(fail)),
    "session": (ZeroDivisionError, in_a_session),
    "await": (ZeroDivisionError, lambda: asyncio.run(awaited())),
    "result twice": (ZeroDivisionError, twice),
    "no room": (trx.PlacementError, lambda: trx.launch(fail, cpus_per_worker=1000)),
    "no host": (trx.PlacementError, lambda: trx.launch(fail, hostnames=["nowhere"])),
    "session without room": (trx.PlacementError, lambda: trx.Launcher(hostnames=9).session()),
    "argument": (trx.PayloadError, lambda: trx.launch(print, (threading.Lock(),))),
    "value": (trx.PayloadError, returned),
    "option": (TypeError, lambda: trx.launch(fail, workers=2)),
    "option's value": (ValueError, lambda: trx.launch(fail, workers_per_host=0)),
    "no function": (TypeError, lambda: trx.launch(3)),  # pyright: ignore
    "timeout": (TypeError, lambda: asked("3")),
    "time": (TimeoutError, lambda: asked(0)),
}


@pytest.mark.parametrize("what", RAISED)
def test_traceback_has_at_most_two_frames_of_ours(what: str, cluster: None) -> None:
    kind, call = RAISED[what]
    with pytest.raises(kind) as caught:
        call()
    shown = "".join(traceback.format_exception(caught.value))
    assert 1 <= shown.count("/torchrunx_ray/") <= 2, shown
    assert "concurrent/futures" not in shown
