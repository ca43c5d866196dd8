"""Nodes that will leave the cluster soon, by Ray's own announcement."""

import logging
from collections.abc import Mapping
from typing import Any

import ray._private.state as ray_state

from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection

logger = logging.getLogger("torchrunx_ray")


async def deadlines(connection: Connection) -> Mapping[str, float | None]:
    """Return the draining nodes by id, each with the time at which it ends, in seconds since the epoch.

    None means that the node has no deadline.
    """
    try:
        return await connection.call(connection.inside, _ask)
    except ClusterLeft:
        raise
    except Exception as error:  # the call is not public
        logger.debug("Ray did not say which nodes are draining", exc_info=error)
        return {}


def _ask() -> dict[str, float | None]:
    state: Any = ray_state.state
    deadlines_ms: dict[str, int] = state.get_draining_nodes()
    return {node_id: ms / 1000 if ms > 0 else None for node_id, ms in deadlines_ms.items()}
