"""Answers of the cluster's autoscaler, if any, about a launch that waits for room."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray._raylet
from ray.core.generated import autoscaler_pb2

from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.connection import Connection

_raylet: Any = ray._raylet  # Cython has no types, nor do messages made at run time
_messages: Any = autoscaler_pb2

_V1_REPORT = b"__autoscaling_status"
"""Key of the older autoscaler's report. A cluster without an autoscaler has a report there, too."""


@dataclass(frozen=True)
class Outlook:
    """Prospect that the cluster grows for a placement group.

    `starting` counts the nodes that are being started, by node type. `refused` is True if the autoscaler has
    looked at the group, and would start no node for it.
    """

    can_grow: bool = False
    refused: bool = False
    starting: Mapping[str, int] = field(default_factory=dict[str, int])


def outlook(group_id: str) -> Outlook:
    """Ask Ray's head about a placement group. Ray has no public function for this."""
    return Outlook() if inventory.was_started_here() else Connection().inside(_ask, group_id)


def _ask(group_id: str) -> Outlook:
    gcs = _raylet.GcsClient(address=inventory.context().gcs_address)
    status = _messages.GetClusterStatusReply.FromString(gcs.get_cluster_status())
    if status.HasField("autoscaling_state"):
        return _of_v2(status.autoscaling_state, group_id)
    report: bytes | None = gcs.internal_kv_get(_V1_REPORT, None, timeout=5)
    return _of_v1(json.loads(report)) if report else Outlook()


def _of_v2(state: Any, group_id: str) -> Outlook:
    """Read a v2 report. Without an autoscaler the report refuses every waiting group."""
    refused = any(
        request.details.startswith(group_id) for request in state.infeasible_gang_resource_requests
    )
    starting = {
        request.ray_node_type_name: request.count for request in state.pending_instance_requests
    }
    return Outlook(can_grow=True, refused=refused, starting=starting)


def _of_v1(report: Mapping[str, Any]) -> Outlook:
    """Read a v1 report, which does not say which groups the autoscaler refuses.

    Without an autoscaler the report gives every node a type of its own, named after the node. In a cluster's
    first seconds the report names no types; an autoscaler may still appear.
    """
    nodes: Mapping[str, Any] = report.get("autoscaler_report") or {}
    type_by_node: Mapping[str, str] = nodes.get("node_type_mapping") or {}
    if type_by_node and all(kind == f"node_{node}" for node, kind in type_by_node.items()):
        return Outlook()
    return Outlook(can_grow=True, starting=nodes.get("pending_launches") or {})
