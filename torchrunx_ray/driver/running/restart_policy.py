"""Decisions about what follows an attempt."""

import asyncio
import enum
import inspect
from collections.abc import Callable

from torchrunx_ray.driver.background.loop import in_thread
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import AttemptRecord, Why

_CALM_S = 60.0
"""Length of an attempt after which a lost host is no longer one of a series."""

_FIRST_PAUSE_S = 0.5
"""Pause before the attempt that follows the second lost host of a series. It doubles with each further one."""

_LONGEST_PAUSE_S = 30.0

_MOST_LOSSES = 5
"""Length of a series of lost hosts after which a loss counts, unless the launch may lose more hosts than that."""


class Verdict(enum.Enum):
    """Decision after an attempt."""

    END = "the run ends"
    RESTART = "the workers are started again, which counts towards max_restarts"
    GO_ON = "the workers are started again, which does not count"


class RestartPolicy:
    """Decides by the options of a run, and counts its restarts."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.restarts = 0
        """Number of restarts that count."""
        self._losses = 0
        """Length of the current series of attempts that lost a host soon after they began."""

    @property
    def in_words(self) -> str:
        """Return words such as "restart 1 of 3"; "" before the first restart."""
        return f"restart {self.restarts} of {self._options.max_restarts}" if self.restarts else ""

    @property
    def last_words(self) -> str:
        """Return why no other attempt follows a failure; "" if there is nothing to tell."""
        words: list[str] = []
        if self._losses_count:
            words.append(
                f"{self._losses} attempts in a row have lost a host less than {_CALM_S:.0f} s after they began, so the "
                "function may be the cause. Such a loss counts as a failure."
            )
        if self.restarts and not self._has_restarts:
            words.append(f"This was {self.in_words}; no restart is left.")
        return " ".join(words)

    def note_end(self, last: AttemptRecord) -> None:
        """Note how an attempt ended, before the verdict."""
        if last.why != "host lost":
            self._losses = 0
            return
        is_calm = last.ended is not None and last.ended - last.begun > _CALM_S
        self._losses = 0 if is_calm else self._losses + 1

    def verdict(self, why: Why, failures: Failures | None) -> Verdict:
        """Return the decision, which `restart_if` may still turn into the end."""
        if why in ("returned", "stopped") or not self._options.may_restart:
            return Verdict.END
        if why in ("resized", "drained"):
            return Verdict.GO_ON
        if why == "host lost" and self._options.is_elastic and not self._losses_count:
            return Verdict.GO_ON
        may_restart = self._has_restarts and failures is not None and failures.may_go_away
        return Verdict.RESTART if may_restart else Verdict.END

    async def back_off(self) -> None:
        """Wait before another attempt if hosts are lost again and again, since such losses may not count."""
        if self._losses > 1:
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._losses - 2, 10))
            await asyncio.sleep(pause_s)

    @property
    def _has_restarts(self) -> bool:
        return self.restarts < self._options.max_restarts

    @property
    def _losses_count(self) -> bool:
        """True if an elastic launch has lost hosts so often that the function may be the cause."""
        least, most = self._options.least_hosts, self._options.most_hosts
        if not self._options.is_elastic or least is None or most is None:
            return False
        return self._losses > max(_MOST_LOSSES, most - least)


async def ask_user(restart_if: Callable[[BaseException], bool], failures: Failures) -> bool:
    """Return the answer of `restart_if`. Raises its error, with the failure as the cause.

    It is asked in a thread, since the exception and `restart_if` are the user's code.
    """
    answer = await in_thread(_answer, restart_if, failures)
    if isinstance(answer, BaseException):
        try:
            raise answer from failures.exception
        finally:
            del answer  # it refers to this frame
    return answer


def _answer(
    restart_if: Callable[[BaseException], bool], failures: Failures
) -> bool | BaseException:
    """Return the answer of `restart_if`, or its error as a value. To raise the failure again means no.

    Some exceptions mean something else to a coroutine or an event loop; they are in a RuntimeError.
    """
    try:
        answer: object = restart_if(failures.exception)
        if inspect.iscoroutine(answer):
            answer.close()
            raise TypeError("restart_if returned a coroutine; expected True or False")
        return bool(answer)
    except BaseException as error:
        if error is failures.exception:
            return False  # the launch raises it
        error.add_note("Raised by restart_if, which was asked about the failure of the run.")
        if isinstance(error, Exception) and not isinstance(
            error, StopIteration | StopAsyncIteration
        ):
            return error
        return RuntimeError(f"restart_if raised {type(error).__name__}: {error}")
