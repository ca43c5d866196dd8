"""What workers say reaches its places, whatever becomes of the thread that brings it there."""

import os
import threading
import time

import pytest

import torchrunx_ray as trx
from tests.logs import Kept
from tests.processes import wait_until
from torchrunx_ray.driver import attempt
from torchrunx_ray.driver.connection import ClusterLeft
from torchrunx_ray.driver.logs.run_logs import RunLogs
from torchrunx_ray.driver.logs.speaker import Speaker


async def test_record_that_cannot_be_read_ends_neither_the_output_nor_the_run(kept: Kept) -> None:
    """json.loads raises RecursionError. The thread ended, and the run waited for it for ever."""
    who = Speaker("vm", 0, 0, is_first_host=True)
    logs = RunLogs("run", trx.Launcher(log_handlers=[kept]), [kept], None, [who])
    logs.put(who, "records", b"[" * 200_000 + b"\n", time.time())
    logs.put(who, "stdout", b"after it\n", time.time())
    await logs.drain()

    assert "after it" in [text for _, text in kept.said]


def test_run_that_cannot_begin_leaves_no_thread(
    one: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when ray.shutdown() comes just then."""

    def leave(*_: object) -> None:
        raise ClusterLeft(through_client=False)

    monkeypatch.setattr(attempt, "Talk", leave)
    with pytest.raises(trx.LaunchError, match="left the Ray cluster"):
        one.run(os.getpid)
    assert wait_until(lambda: "torchrunx_ray output" not in names_of_threads())


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
