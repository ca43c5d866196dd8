"""From options and the nodes there are to the hosts of a launch and what each must hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrunx_ray.driver.cluster import Node
from torchrunx_ray.driver.options import Options
from torchrunx_ray.errors import PlacementError


@dataclass(frozen=True)
class HostWanted:
    """One host of a launch: its workers, its bundle, and the node where that is decided."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    bundle: dict[str, float]
    node: Node | None
    label: str | None
    """What the user called it, where they did."""


def resolve(options: Options, nodes: Sequence[Node], driver_node_id: str) -> list[HostWanted]:
    """Decide hosts and counts over the live nodes."""
    chosen, labels, pinned = _choose(options, nodes, driver_node_id)
    workers = _workers(options, chosen)
    gpus = _gpus_per_worker(options, chosen, workers)
    wanted: list[HostWanted] = []
    for node, label, count in zip(chosen, labels, workers, strict=True):
        cpus = _cpus_per_worker(options, node, count)
        bundle = {
            "CPU": round(count * cpus, 4),
            "GPU": round(count * gpus, 4),
            **(options.resources_per_host or {}),
        }
        bundle = {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}
        wanted.append(HostWanted(count, cpus, gpus, bundle, node if pinned else None, label))
    return wanted


def _choose(
    options: Options, nodes: Sequence[Node], driver_node_id: str
) -> tuple[list[Node | None], list[str | None], bool]:
    """The hosts' nodes (None: any), their labels, and whether they must be just these."""
    hosts = options.hostnames
    if isinstance(hosts, Sequence) and not isinstance(hosts, str):
        return [_find(name, nodes, driver_node_id) for name in hosts], list(hosts), True
    candidates = [node for node in nodes if node.cpus or node.gpus]
    depends_on_host = isinstance(options.workers_per_host, str)
    if (
        depends_on_host
        and any(node.gpus for node in candidates)
        and options.workers_per_host != "cpu"
    ):
        candidates = [node for node in candidates if node.gpus]
    candidates.sort(key=lambda node: (-node.gpus, -node.cpus))
    if isinstance(hosts, str):  # "auto"
        workers = options.workers_per_host
        hosts = len(candidates) if isinstance(workers, int | str) else len(workers)
    chosen: list[Node | None] = list(candidates[:hosts])
    if not chosen or (depends_on_host and len(chosen) < hosts):
        raise PlacementError(
            f"hostnames={options.hostnames!r} asks for {hosts or 'live'} nodes, and {len(chosen)} "
            f"match workers_per_host={options.workers_per_host!r}.",
            available={node.hostname: node.resources for node in nodes},
            advice="Plain numbers for both let an autoscaler start from nothing.",
        )
    chosen += [None] * (hosts - len(chosen))
    return chosen, [None] * len(chosen), depends_on_host or options.hostnames == "auto"


def _find(name: str, nodes: Sequence[Node], driver_node_id: str) -> Node:
    for node in nodes:
        names = (node.hostname, node.hostname.partition(".")[0], node.ip, node.node_id)
        if name in names or (name == "localhost" and node.node_id == driver_node_id):
            return node
    live = ", ".join(f"{node.hostname} ({node.ip})" for node in nodes)
    raise PlacementError(
        f"hostnames: {name!r} is no live node of this Ray cluster.", advice=f"Live are: {live}."
    )


def _workers(options: Options, chosen: Sequence[Node | None]) -> list[int]:
    workers = options.workers_per_host
    if isinstance(workers, int):
        return [workers] * len(chosen)
    if not isinstance(workers, str):
        return list(workers)
    nodes = [node for node in chosen if node is not None]
    use_gpus = workers == "gpu" or (workers == "auto" and any(node.gpus for node in nodes))
    counts = [int(node.gpus if use_gpus else node.cpus) for node in nodes]
    if 0 in counts:
        node = nodes[counts.index(0)]
        raise PlacementError(
            f"workers_per_host={workers!r}: {node.hostname} has no {'GPU' if use_gpus else 'CPU'}.",
            available={node.hostname: node.resources for node in nodes},
            advice="Say how many workers it shall run, or leave it out of hostnames.",
        )
    return counts


def _gpus_per_worker(
    options: Options, chosen: Sequence[Node | None], workers: Sequence[int]
) -> float:
    if options.gpus_per_worker is not None:
        return options.gpus_per_worker
    if options.workers_per_host == "cpu":
        return 0
    return int(
        all(
            node is not None and node.gpus >= count
            for node, count in zip(chosen, workers, strict=True)
        )
    )


def _cpus_per_worker(options: Options, node: Node | None, workers: int) -> float:
    if options.cpus_per_worker is not None:
        return options.cpus_per_worker
    return 1 if node is None else min(1.0, node.cpus / workers)
