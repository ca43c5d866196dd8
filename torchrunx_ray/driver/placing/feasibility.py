"""Checks that nodes can hold what a launch needs."""

from collections.abc import Iterable, Mapping, Sequence

from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.errors import amounts_in_words, counted

_ACCELERATOR = "accelerator_type:"
"""Prefix of Ray's resources for accelerator types."""

_VALUES_SHOWN = 20


def could_be_host(node: Node, options: Options) -> bool:
    """Return True if, by the options alone, a node could hold a host's workers."""
    has_enough = is_in(least_needs(options), node.resources)
    return bool(node.cpus or node.gpus) and has_enough and _has_labels(node, options)


def least_needs(options: Options) -> dict[str, float]:
    """Return the least needs of a host. A worker count that depends on the host is taken as 1."""
    workers = options.workers_per_host if isinstance(options.workers_per_host, int) else 1
    needs = dict(options.resources_per_host or {})
    needs["CPU"] = workers * (options.cpus_per_worker or 0)
    needs["GPU"] = workers * (options.gpus_per_worker or 0)
    if options.accelerator_type is not None:
        needs[f"{_ACCELERATOR}{options.accelerator_type}"] = 0.001
    return {name: amount for name, amount in needs.items() if amount}


def why_impossible(
    wanted: Sequence[Mapping[str, float]], nodes: Sequence[Node], options: Options
) -> str | None:
    """Return the reason why these nodes can never hold the bundles; None if there is none.

    Ray reports this itself, with two exceptions: a PACK group that is too large for a busy cluster, and, in
    some versions, labels that no node has.
    """
    unknown = what_no_node_is(nodes, options)
    if unknown is not None:
        return unknown
    nodes = [node for node in nodes if _has_labels(node, options)]
    apart = "each on a separate node (placement_strategy='STRICT_SPREAD')"
    is_apart = options.placement_strategy == "STRICT_SPREAD"
    if is_apart and len(nodes) < len(wanted):
        count = counted(len(nodes), "node")
        matching = f" that match{'es' * (len(nodes) == 1)} label_selector"
        which = count + (matching if options.label_selector else "")
        return f"{len(wanted)} hosts are wanted, {apart}, and the cluster has {which}"
    for bundle in wanted:
        for name, amount in bundle.items():
            largest = max(node.resources.get(name, 0) for node in nodes)
            if largest < amount:
                needed = amounts_in_words({name: amount})
                return f"a host needs {needed}; the largest node has {largest:g}"
    for name in {name for bundle in wanted for name in bundle}:
        needed = sum(bundle.get(name, 0) for bundle in wanted)
        total = sum(node.resources.get(name, 0) for node in nodes)
        if total < needed:
            return f"its hosts need {needed:g} {name} together; the cluster has {total:g}"
    fitting = sum(any(is_in(bundle, node.resources) for bundle in wanted) for node in nodes)
    if is_apart and fitting < len(wanted):
        return f"{len(wanted)} hosts are wanted, {apart}, and only {counted(fitting, 'node')} could hold one"
    return None


def what_no_node_is(nodes: Sequence[Node], options: Options) -> str | None:
    """Return a clause about requested labels or an accelerator that no node has, with the existing ones.

    None if some node has them.
    """
    selector = dict(options.label_selector or {})
    matching = [node for node in nodes if _has_labels(node, options)]
    if not matching:
        there = [f"{key} {_in_words({n.labels.get(key) for n in nodes})}" for key in selector]
        return f"no node matches label_selector={selector!r}; the nodes have: {'; '.join(there)}"
    kinds = {
        name.removeprefix(_ACCELERATOR)
        for node in matching
        for name in node.resources
        if name.startswith(_ACCELERATOR)
    }
    if options.accelerator_type in (None, *kinds):
        return None
    which = f"no node that matches label_selector={selector!r}" if selector else "no node"
    return (
        f"{which} has accelerator_type={options.accelerator_type!r}; there are: {_in_words(kinds)}"
    )


def unplaced(
    wanted: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]]
) -> list[Mapping[str, float]]:
    """Return the bundles that do not fit into the free resources, one node for each bundle."""
    left, missing = list(free), list[Mapping[str, float]]()
    for bundle in wanted:
        node = next((node for node in left if is_in(bundle, node)), None)
        if node is None:
            missing.append(bundle)
        else:
            left.remove(node)
    return missing


def _in_words(values: Iterable[str | None]) -> str:
    found = sorted(value for value in values if value is not None)
    shown = [*found[:_VALUES_SHOWN], *(["..."] if found[_VALUES_SHOWN:] else [])]
    return ", ".join(shown) or "(none)"


def _has_labels(node: Node, options: Options) -> bool:
    return all(
        _selects(wanted, node.labels.get(key))
        for key, wanted in (options.label_selector or {}).items()
    )


def is_in(bundle: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in bundle.items())


def _selects(wanted: str, label: str | None) -> bool:
    """Return True if a label matches a selector of Ray: "a", "!a", "in(a,b)" or "!in(a,b)"."""
    negated = wanted.startswith("!")
    values = wanted.removeprefix("!")
    if values.startswith("in(") and values.endswith(")"):
        values = values[3:-1]
    return (label in [value.strip() for value in values.split(",")]) is not negated
