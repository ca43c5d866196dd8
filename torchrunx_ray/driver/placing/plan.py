"""The plan of a launch, made from its options and the live nodes: hosts, workers and bundles."""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torchrunx_ray.driver.cluster.inventory import Node, other_hosts, was_started_here
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import slurm
from torchrunx_ray.driver.placing.feasibility import could_be_host, least_needs, why_impossible
from torchrunx_ray.errors import PlacementError, counted
from torchrunx_ray.wire.ranks import gpus_held

_LOOPBACK = ("127.0.0.1", "127.0.1.1", "::1")
"""Addresses by which a machine refers to itself. Debian maps its hostname to the second one."""


@dataclass(frozen=True)
class HostWanted:
    """One host of a launch: its workers, its bundle, and its node if that is fixed."""

    workers: int
    bundle: dict[str, float]
    node: Node | None
    label: str
    """The user's name for the host; empty if there is none."""


@dataclass(frozen=True)
class Host:
    """One host of a placed launch, with the resources of its bundle."""

    node: Node
    label: str
    workers: int
    bundle: Mapping[str, float]
    gpus_per_worker: float


@dataclass(frozen=True)
class Plan:
    """A launch's requirements for the cluster."""

    hosts: list[HostWanted]
    gpus_per_worker: float
    backend: str | None

    @property
    def needed(self) -> dict[str, float]:
        """Resources that all hosts need together."""
        names = {name for host in self.hosts for name in host.bundle}
        return {name: sum(host.bundle.get(name, 0) for host in self.hosts) for name in names}

    def fits_in_sum(self, nodes: Sequence[Node]) -> bool:
        return all(
            sum(node.resources.get(name, 0) for node in nodes) >= amount
            for name, amount in self.needed.items()
        )


def resolve(options: Options, nodes: Sequence[Node], driver_node_id: str) -> Plan:
    """Decide hosts, counts and backend from the live nodes. With hostnames="slurm" this may block."""
    chosen, labels, pinned = _choose(options, nodes, driver_node_id)
    workers = _workers(options, chosen)
    gpus = _gpus_per_worker(options, chosen, workers)
    hosts = [
        HostWanted(count, _bundle(options, node, count, gpus), node if pinned else None, label)
        for node, label, count in zip(chosen, labels, workers, strict=True)
    ]
    return Plan(hosts, gpus, _backend(options, gpus))


def _choose(
    options: Options, nodes: Sequence[Node], driver_node_id: str
) -> tuple[list[Node | None], Sequence[str], bool]:
    """Return the hosts' nodes (None: any), their labels, and True if the hosts are pinned to these nodes."""
    hosts, workers = options.hostnames, options.workers_per_host
    if hosts == "slurm":
        names = slurm.hosts()
        allocated = _of_allocation(names, nodes, driver_node_id)
        _refuse_twins(names, allocated)
        return list(allocated), names, True
    if not isinstance(hosts, int | str):
        names = [str(name) for name in hosts]
        found = [_find(name, nodes, driver_node_id) for name in names]
        _refuse_twins(names, found)
        return list(found), names, True
    candidates = [node for node in nodes if could_be_host(node, options)]
    prefers_gpus = workers in ("auto", "gpu") or (hosts == "auto" and workers != "cpu")
    if prefers_gpus and any(node.gpus for node in candidates):
        candidates = [node for node in candidates if node.gpus]
    candidates.sort(key=lambda node: (-node.gpus, -node.cpus))
    depends_on_nodes = hosts == "auto" or isinstance(workers, str)
    count = hosts if isinstance(hosts, int) else len(candidates)
    if depends_on_nodes and len(candidates) < max(count, 1):
        wanted = [least_needs(options)] * max(count, 1)
        reason = (
            why_impossible(wanted, nodes, options) or f"{len(candidates)} of the live nodes match"
        )
        raise PlacementError(
            f"hostnames={hosts!r} with workers_per_host={workers!r} depends on the live nodes: {reason}.",
            wanted=wanted,
            total={node.name: node.resources for node in nodes},
            advice=other_hosts() or _numbers_for_an_autoscaler().strip(),
        )
    chosen: list[Node | None] = list(candidates[:count])
    chosen += [None] * (count - len(chosen))
    return chosen, [""] * count, depends_on_nodes


def _of_allocation(names: Sequence[str], nodes: Sequence[Node], driver_node_id: str) -> list[Node]:
    """Return the nodes with these names in Slurm, which may differ from the nodes' own names."""
    by_name = {name: _node_called(name, nodes, driver_node_id) for name in names}
    unknown = [name for name, node in by_name.items() if node is None]
    if unknown and not was_started_here():  # a Ray started here has only this node
        with ThreadPoolExecutor(len(unknown)) as pool:  # each name may take the server seconds
            for name, addresses in zip(unknown, pool.map(_addresses, unknown), strict=True):
                by_name[name] = next((node for node in nodes if node.ip in addresses), None)
    missing = ", ".join(name for name, node in by_name.items() if node is None)
    if missing:
        problem = (
            "the driver's ray.init() found no Ray in this allocation. It started its own Ray, "
            f"which does not have {missing}."
            if was_started_here()
            else f"this Ray cluster has no live node for {missing} of the allocation."
        )
        advice = f"{_live(nodes)}\n{slurm.how_to_start_ray(names)}"
        raise PlacementError(f'hostnames="slurm": {problem}', advice=advice)
    return [node for node in by_name.values() if node is not None]


def _find(name: str, nodes: Sequence[Node], driver_node_id: str) -> Node:
    node = _node_called(name, nodes, driver_node_id)
    if node is None:
        raise PlacementError(
            f"hostnames: {name!r} is not a live node of this Ray cluster.",
            advice=f"{_live(nodes)}\n{other_hosts()}".rstrip(),
        )
    return node


def _node_called(name: str, nodes: Sequence[Node], driver_node_id: str) -> Node | None:
    """Return the node with this name. Prefers the driver's node if several have the name."""
    wanted = name.lower()
    called = [node for node in nodes if wanted in _names(node)]
    if wanted == "localhost" or (wanted in _LOOPBACK and not called):
        called = [node for node in nodes if node.node_id == driver_node_id]
    return min(called, key=lambda node: node.node_id != driver_node_id, default=None)


def _names(node: Node) -> list[str]:
    hostname = node.hostname.lower()
    names = [hostname, hostname.partition(".")[0], node.ip.lower()]
    # A node that left returns with another id.
    return [*names, node.node_id] if node.left_s is None else names


def _addresses(name: str) -> set[str]:
    """Return the addresses to which the driver's machine resolves the name."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {str(info[4][0]) for info in found}


def _live(nodes: Sequence[Node]) -> str:
    return f"Live nodes: {', '.join(sorted(node.name for node in nodes))}."


def _refuse_twins(names: Sequence[str], found: Sequence[Node]) -> None:
    by_node: dict[str, str] = {}
    for name, node in zip(names, found, strict=True):
        if node.node_id in by_node:
            raise ValueError(
                f"hostnames: {by_node[node.node_id]!r} and {name!r} are the same node, "
                f"{node.name}; name each once."
            )
        by_node[node.node_id] = name


def _workers(options: Options, chosen: Sequence[Node | None]) -> list[int]:
    workers = options.workers_per_host
    if isinstance(workers, int):
        return [workers] * len(chosen)
    nodes = [node for node in chosen if node is not None]
    if not isinstance(workers, str):
        if len(workers) != len(chosen):
            names = ", ".join(node.name for node in nodes)
            raise ValueError(
                f"workers_per_host={list(workers)!r} has {counted(len(workers), 'number')}, but the launch has "
                f"{counted(len(chosen), 'host')} ({names}); give one number per host."
            )
        return list(workers)
    if workers == "slurm":
        return _workers(
            replace(options, workers_per_host=slurm.workers_per_host(len(chosen))), chosen
        )
    use_gpus = workers == "gpu" or (workers == "auto" and any(node.gpus for node in nodes))
    counts = [int(node.gpus if use_gpus else node.cpus) for node in nodes]
    if 0 in counts:
        node = nodes[counts.index(0)]
        raise PlacementError(
            f"workers_per_host={workers!r}: {node.hostname} has no {'GPU' if use_gpus else 'CPU'}.",
            total={node.name: node.resources for node in nodes},
            advice=_instead_of_counting(options, use_gpus=use_gpus),
        )
    return counts


def _instead_of_counting(options: Options, *, use_gpus: bool) -> str:
    """Return advice for a host that has none of the GPUs or CPUs by which workers are counted."""
    numbers = (
        'workers_per_host="cpu", or a number of workers' if use_gpus else "a number of workers"
    )
    if options.hostnames == "slurm" or not isinstance(options.hostnames, int | str):
        return f"Use {numbers}, or leave the host out of hostnames."
    return f"Use {numbers}." + _numbers_for_an_autoscaler()


def _numbers_for_an_autoscaler() -> str:
    if was_started_here():
        return ""
    return (
        " If an autoscaler should start nodes, give numbers, as in hostnames=2, workers_per_host=8, "
        "gpus_per_worker=1. Without gpus_per_worker, a node that does not exist yet counts as a node without GPUs."
    )


def _gpus_per_worker(
    options: Options, chosen: Sequence[Node | None], workers: Sequence[int]
) -> float:
    if options.gpus_per_worker is not None:
        return options.gpus_per_worker
    if options.workers_per_host == "cpu":
        return 0
    enough = [
        node is not None and node.gpus >= count for node, count in zip(chosen, workers, strict=True)
    ]
    return int(all(enough))


def _bundle(options: Options, node: Node | None, workers: int, gpus: float) -> dict[str, float]:
    cpus = options.cpus_per_worker
    if cpus is None:
        cpus = 1 if node is None else min(1.0, node.cpus / workers)
    bundle: dict[str, float] = {"CPU": round(workers * cpus, 4), "GPU": gpus_held(gpus, workers)}
    for name, amount in (options.resources_per_host or {}).items():
        bundle[name] = bundle.get(name, 0) + amount
    if options.accelerator_type is not None:
        bundle[f"accelerator_type:{options.accelerator_type}"] = 0.001
    # Ray refuses an empty bundle.
    return {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}


def _backend(options: Options, gpus: float) -> str | None:
    if options.backend == "auto":
        return "nccl" if gpus >= 1 else "gloo"
    if options.backend == "nccl" and gpus < 1:
        raise ValueError(
            f"backend='nccl' needs a GPU for every worker, but gpus_per_worker is {gpus:g} here. nccl "
            "refuses two ranks on one GPU. Ask for GPUs, or use backend='gloo'."
        )
    return options.backend
