"""Ctrl-C and other signals while the user waits for a run."""

import asyncio
import concurrent.futures
import contextlib
import logging
import sys
from typing import Any

from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.tracebacks import has_users_frame

logger = logging.getLogger("torchrunx_ray")

_TELL_AFTER_S = 0.5
"""Time before the warning. Most workers end sooner, so that there is nothing left to kill."""


def is_interruption(error: BaseException) -> bool:
    """Return True if an exception interrupted a wait from outside.

    Such exceptions are KeyboardInterrupt (Ctrl-C), SystemExit (`sys.exit`), and any exception that a
    signal handler raises. A handler's exception has the handler's frame in its traceback.
    """
    return isinstance(error, KeyboardInterrupt | SystemExit) or has_users_frame(error)


def is_second_ctrl_c_of_asyncio() -> bool:
    """Return True if asyncio.run is ending because Ctrl-C was pressed twice.

    asyncio.run cancels its main task at the first Ctrl-C, and cancels the task again at its own end. A
    second Ctrl-C raises KeyboardInterrupt in the event loop. After a single Ctrl-C, asyncio.run makes the
    KeyboardInterrupt from the main task's CancelledError.
    """
    raised = sys.exception()
    return isinstance(raised, KeyboardInterrupt) and not isinstance(
        raised.__context__, asyncio.CancelledError
    )


def wait_after(
    interruption: BaseException | None,
    run: "concurrent.futures.Future[Any]",
    name: str,
    shutdown_timeout: float,
) -> None:
    """Wait for a run. If Ctrl-C does not stop the run soon, log how to kill it."""
    if isinstance(interruption, KeyboardInterrupt) and not loop.wait(run, _TELL_AFTER_S):
        with contextlib.suppress(Exception):  # one of the driver's log handlers may fail
            logger.warning(
                "%s is being stopped: its workers have %g s (shutdown_timeout) to end. A second Ctrl-C "
                "kills them at once.",
                name,
                shutdown_timeout,
            )
    loop.wait(run)


def tell_of_stop(interruption: BaseException, progress: Progress) -> None:
    """Add notes to an interruption that say what the stopped run was doing."""
    if (failures := progress.failures_before_stop) is not None:
        interruption.add_note(f"Before that, the run had failed: {failures.in_brief}")
    if stacks := progress.stacks_at_stop:
        interruption.add_note(f"When the run was interrupted:\n{stacks.summary}")
    if progress.log_directory is not None:
        interruption.add_note(f"All output of this launch: {progress.log_directory}")
    if isinstance(interruption, SystemExit):  # Python prints nothing for SystemExit
        logger.warning(
            "%s was stopped, because the driver is exiting (SystemExit: %s, which Ray raises on SIGTERM).\n%s",
            progress.name,
            interruption,
            "\n".join(getattr(interruption, "__notes__", ())),
        )
