"""Nodes that have room at this moment, to which the bundles of a placement group are pinned.

Ray moves a lost bundle that is not pinned to another node. While each node that could take it is full, Ray 2.60 tries
without a pause, and places no other group of the cluster. A launch that may lose a host, and go on, would cause this.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torchrunx_ray.driver.cluster import draining, inventory
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.feasibility import could_be_host, is_in
from torchrunx_ray.driver.placing.plan import HostWanted, Plan


async def pin(
    plan: Plan, options: Options, nodes: Sequence[Node], connection: Connection
) -> Plan | None:
    """Return the plan on nodes that have room now; None if there is no room."""
    free, leaving = await asyncio.gather(
        connection.call(connection.inside, inventory.free_by_node), draining.deadlines(connection)
    )
    candidates = [
        node for node in nodes if could_be_host(node, options) and node.node_id not in leaving
    ]
    hosts = _assigned(plan.hosts, candidates, free, options.placement_strategy)
    return None if hosts is None else replace(plan, hosts=hosts)


def _assigned(
    hosts: Sequence[HostWanted],
    nodes: Sequence[Node],
    free: Mapping[str, Mapping[str, float]],
    strategy: str,
) -> list[HostWanted] | None:
    """Return the hosts with nodes. Hosts without GPUs leave nodes with GPUs to others, if they can."""
    left = {node.node_id: dict(free.get(node.node_id, {})) for node in nodes}
    used: list[str] = []
    assigned: list[HostWanted] = []
    for host in hosts:
        needs_gpu = bool(host.bundle.get("GPU"))
        fitting = [node for node in nodes if is_in(host.bundle, left[node.node_id])]
        in_order = sorted(fitting, key=lambda node: not needs_gpu and node.gpus > 0)
        node = _preferred(in_order, used, strategy)
        if node is None:
            return None
        used.append(node.node_id)
        for name, amount in host.bundle.items():
            left[node.node_id][name] -= amount
        assigned.append(replace(host, node=node))
    return assigned


def _preferred(fitting: Sequence[Node], used: Collection[str], strategy: str) -> Node | None:
    """Return the node for one more host, beside those that are used; None if there is none."""
    fresh = [node for node in fitting if node.node_id not in used]
    again = [node for node in fitting if node.node_id in used]
    match strategy:
        case "STRICT_SPREAD":
            in_order = fresh
        case "SPREAD":
            in_order = fresh + again
        case "PACK":
            in_order = again + fresh
        case _:  # STRICT_PACK
            in_order = again if used else fresh
    return next(iter(in_order), None)
