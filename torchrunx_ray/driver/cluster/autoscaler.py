"""Answers of the cluster's autoscaler, if there is one, about a launch that waits for room."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray._raylet
from ray.core.generated import autoscaler_pb2

from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.connection import Connection

_raylet: Any = ray._raylet  # Cython, and made at run time: neither has types
_messages: Any = autoscaler_pb2

_V1_REPORT = b"__autoscaling_status"
"""The key under which the older autoscaler, and what stands in for it without one, reports."""


@dataclass(frozen=True)
class Outlook:
    """Prospect that the cluster grows for a placement group.

    `starting` counts the nodes on their way, by node type. `refused`: the autoscaler has looked at
    the group, and would start no node for it.
    """

    can_grow: bool = False
    refused: bool = False
    starting: Mapping[str, int] = field(default_factory=dict[str, int])


def outlook(group_id: str) -> Outlook:
    """Ask Ray's head about a placement group; no public function tells any of it."""
    return Outlook() if inventory.was_started_here() else Connection().inside(_ask, group_id)


def _ask(group_id: str) -> Outlook:
    gcs = _raylet.GcsClient(address=inventory.context().gcs_address)
    status = _messages.GetClusterStatusReply.FromString(gcs.get_cluster_status())
    if status.HasField("autoscaling_state"):
        return _of_v2(status.autoscaling_state, group_id)
    report: bytes | None = gcs.internal_kv_get(_V1_REPORT, None, timeout=5)
    return _of_v1(json.loads(report)) if report else Outlook()


def _of_v2(state: Any, group_id: str) -> Outlook:
    """Read its report. If there is no autoscaler, the report refuses every group that waits."""
    refused = any(
        request.details.startswith(group_id) for request in state.infeasible_gang_resource_requests
    )
    starting = {
        request.ray_node_type_name: request.count for request in state.pending_instance_requests
    }
    return Outlook(can_grow=True, refused=refused, starting=starting)


def _of_v1(report: Mapping[str, Any]) -> Outlook:
    """It does not tell whom it refuses.

    Without an autoscaler the report is there all the same, with a made-up type for each node. In a
    cluster's first seconds it names none, and may yet turn out to be an autoscaler's.
    """
    nodes: Mapping[str, Any] = report.get("autoscaler_report") or {}
    type_by_node: Mapping[str, str] = nodes.get("node_type_mapping") or {}
    if type_by_node and all(kind == f"node_{node}" for node, kind in type_by_node.items()):
        return Outlook()
    return Outlook(can_grow=True, starting=nodes.get("pending_launches") or {})
