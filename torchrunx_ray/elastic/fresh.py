"""A run in a fresh process, for an agent in a forked child of a driver: Ray's connection does not survive a fork."""

import enum
import os
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from typing import Any

from torchrunx_ray.driver.cluster import connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.to_destinations import Destinations
from torchrunx_ray.driver.running.crew import GroupPlan
from torchrunx_ray.elastic.run import Assembled, Ended, Work
from torchrunx_ray.errors import LaunchError
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.values.payload import pack

_CLOSING_S = 30.0
"""Time beyond `shutdown_timeout` for the process to end its workers and give the hosts back."""


_ANSWER_S = 60.0
"""Time for an answer that takes no work. The machine may be busy."""

_EXIT_S = 5.0
"""Time for the process to exit by itself."""


class _State(enum.Enum):
    IDLE = "waits for a request"
    ASKED = "works on a request, whose answer was not received"
    ENDED = "has ended, or ends"


class FreshRun:
    """The agent's end of a run in a process of its own, see `serve`. The process ends with the agent's."""

    def __init__(self, options: Options, work: Work) -> None:
        self._options = options
        packed = pack([("the entrypoint", work.entrypoint), ("its arguments", tuple(work.args))])
        self._channel, theirs = Channel.pair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from torchrunx_ray.elastic.serve import main; main({theirs.fileno()}, {os.getpid()})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "RAY_ADDRESS": connection.parents_address()},
            start_new_session=True,  # Ctrl-C is the agent's, which tells this process to stop
        )
        theirs.close()
        self._state = _State.IDLE
        try:
            self._ask("begin", tuple(sys.argv), options, packed, work.numa_options)
        except BaseException:
            self._end()
            raise

    def assemble(self, restarts: int, until_warm: bool) -> Assembled:
        return self._ask("assemble", restarts, until_warm)

    def start(self, plan: GroupPlan, destinations: Destinations) -> dict[int, int]:
        return self._ask("start", plan, destinations)

    def ended(self) -> Ended | None:
        return self._ask("ended", within_s=_ANSWER_S)

    @property
    def hosts_waiting(self) -> int:
        return self._ask("hosts_waiting", within_s=_ANSWER_S)

    def stop(self) -> None:
        self._ask("stop")

    def close(self, signum: signal.Signals) -> None:
        """End the run and the process. Safe to call again, and after an interrupted request."""
        is_closed = False
        try:
            if self._state is _State.IDLE:
                self._ask("close", signum, within_s=self._options.shutdown_timeout + _CLOSING_S)
                is_closed = True
        finally:
            self._end(is_closed)

    def _end(self, is_closed: bool = False) -> None:
        """End the process. If its run is not closed yet, it closes that first."""
        self._state = _State.ENDED
        self._channel.close()
        if is_closed and self._ends_within(_EXIT_S):
            return
        self._process.terminate()  # for which Ray writes lines on stderr
        if not self._ends_within(self._options.shutdown_timeout + _CLOSING_S):
            self._process.kill()
            self._process.wait()

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _ask(self, method: str, *args: object, within_s: float | None = None) -> Any:
        """Return the answer to a request, or raise it. Raises LaunchError if there is none `within_s`."""
        if self._state is not _State.IDLE:
            raise LaunchError(f"the process of the run {self._state.value}: it cannot {method}")
        self._state = _State.ASKED
        try:
            self._channel.send((method, args))
            if not wait([self._channel.fileno()], within_s):
                raise LaunchError(
                    f"the process that runs the workers for this agent (pid {self._process.pid}) has not answered "
                    f'"{method}" in {within_s:g} s, and is ended'
                )
            answer: Any = self._channel.receive()[0]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._state = _State.ENDED
            status = self._process.wait() if self._ends_within(_EXIT_S) else None
            raise LaunchError(
                f"the process that runs the workers for this agent (pid {self._process.pid}) has ended with status "
                f"{status}; its last lines on stderr say why"
            ) from None
        self._state = _State.IDLE
        is_error, value = answer
        if is_error:
            raise value
        return value
