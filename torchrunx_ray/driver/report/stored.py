"""The last step of a run, in which Ray stores the values that the workers returned."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from torchrunx_ray.driver.cluster.connection import Connection, untyped_ray

logger = logging.getLogger("torchrunx_ray")

_SILENT_S = 15.0
"""Time that Ray may take to copy values before a warning. 10 GiB take a few seconds."""


async def until_stored(
    run_name: str,
    values: "Sequence[tuple[str, Sequence[ray.ObjectRef[Any]]]]",
    connection: Connection,
) -> None:
    """Wait until Ray has stored the values, which are given with their hosts' names.

    Until then a value exists only in its agent, and would be lost with the agent.
    """
    refs = [ref for _, of_host in values for ref in of_host]
    hostnames = [hostname for hostname, of_host in values for _ in of_host]
    says_at = time.monotonic() + _SILENT_S
    try:
        while missing := await connection.call(connection.inside, missing_after_a_second, refs):
            if time.monotonic() >= says_at:
                says_at = float("inf")
                _say_missing(run_name, list(dict.fromkeys(hostnames[i] for i in missing)))
    except RayError as error:
        # Raised by the task that waits through ray://. The values are still in the agents.
        logger.warning(
            "%s has ended, but it is not known if Ray has stored all of its values: the task that "
            "waits for them failed (%s). Fetch the values before their hosts leave the cluster.",
            run_name,
            error,
        )


def _say_missing(run_name: str, hostnames: Sequence[str]) -> None:
    logger.warning(
        "%s: its workers have ended, but after %.0f s Ray does not have all values from: %s. The values are large, or "
        "the machine is too busy or swapping, or the agent is frozen or cut off. The run ends when Ray has all values.",
        run_name,
        _SILENT_S,
        ", ".join(hostnames),
    )


def missing_after_a_second(refs: list[Any]) -> list[int]:
    """Wait up to a second, and return the indices of the values that Ray does not have."""
    _, missing = untyped_ray.wait(refs, num_returns=len(refs), timeout=1, fetch_local=False)
    left = set(missing)
    return [i for i, ref in enumerate(refs) if ref in left]
