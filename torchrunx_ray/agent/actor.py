"""The Ray actor that is a launch's agent on one host."""

import asyncio
import ctypes
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import ray

from torchrunx_ray.agent.service import Service
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.payload import Packed, carry_values_packed

T = TypeVar("T")

_ray: Any = ray  # most of its functions have no types

VALUES = "values"
"""The concurrency group of the calls that bring values."""


class Agent:
    """The Ray actor: each call runs a coroutine of `Service` in the agent's own event loop, and waits for it.

    No method is a coroutine, or Ray would serve all of them by fibers. On a busy machine these can lose a
    wake-up (boost's unbuffered_channel), and then the actor hears nothing more.
    """

    def __init__(self, name: str, wanted: messages.TemplateWanted) -> None:
        _end_at_sigterm()
        carry_values_packed()
        self._name = name
        self._service = Service(wanted)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="agent", daemon=True).start()

    def __repr__(self) -> str:
        """Return what Ray puts before the actor's own lines, and shows in its dashboard."""
        return f"torchrunx_ray {self._name}"

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def meet(self, listen: bool) -> messages.Met:
        return self._do(self._service.meet(listen))

    def clock(self) -> int:
        return now_ns()

    def start(self, wanted: messages.RunWanted, function: Packed, *inserted: Packed) -> None:
        self._do(self._service.start(wanted, function, *inserted))

    def fork(self, run_id: str) -> None:
        self._do(self._service.fork(run_id))

    def poll(self, with_output: bool) -> list[messages.Event]:
        return self._do(self._service.poll(with_output))

    def nudge(self) -> None:
        self._do(self._service.nudge())

    @_ray.method(concurrency_group=VALUES)
    def value(self, run_id: str, local_rank: int) -> Packed | None:
        """Return a worker's value; Ray copies it in this thread."""
        return self._do(self._service.value(run_id, local_rank))

    def stacks(self, run_id: str, wanted: messages.StacksWanted) -> dict[int, str]:
        return self._do(self._service.stacks(run_id, wanted))

    def stop(self, run_id: str, grace_s: float) -> None:
        self._do(self._service.stop(run_id, grace_s))

    def others_have_ended(self, run_id: str) -> None:
        self._do(self._service.others_have_ended(run_id))

    def rest(self, linger_s: float) -> None:
        self._do(self._service.rest(linger_s))

    def close(self) -> None:
        self._do(self._service.close())

    def retire(self) -> None:
        _ray.actor.exit_actor()


def _end_at_sigterm() -> None:
    """As Ray's node asks for where the agent's owner died.

    Ray's own handler lets calls end first, and after each poll there is the next. Python would
    have another set in the main thread only, which is Ray's.
    """
    ctypes.CDLL(None).signal(signal.SIGTERM, None)  # SIG_DFL
