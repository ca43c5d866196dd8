"""Names of hosts in logs, errors and results."""

import itertools
from collections.abc import Collection, Sequence

from torchrunx_ray.driver.cluster.inventory import Node


def labels(nodes: Sequence[Node]) -> list[str]:
    """Return the hostnames if they are distinct, else the IPs, with an index if several hosts share an IP."""
    names = [node.hostname for node in nodes]
    ips = [node.ip for node in nodes]
    if len(set(names)) == len(names):
        return names
    if len(set(ips)) == len(ips):
        return ips
    return [f"{ip}#{ips[:i].count(ip)}" if ips.count(ip) > 1 else ip for i, ip in enumerate(ips)]


def distinct_label(node: Node, taken: Collection[str]) -> str:
    """Return the node's hostname if no other host has it, else its IP, with an index if several hosts share the IP."""
    numbered = (f"{node.ip}#{i}" for i in itertools.count())
    return next(
        name for name in itertools.chain((node.hostname, node.ip), numbered) if name not in taken
    )
