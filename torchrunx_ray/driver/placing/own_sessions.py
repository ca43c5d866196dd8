"""Open sessions of this script, named in messages of launches that wait for their resources."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torchrunx_ray.driver.background.forks import empty_in_child
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.errors import amounts_in_words

_open: dict[str, Callable[[], Sequence[Host]]] = {}
"""For each open session, by name, a function that returns its hosts."""


def note_open(name: str, hosts: Callable[[], Sequence[Host]]) -> None:
    _open[name] = hosts


def forget(name: str) -> None:
    _open.pop(name, None)


def holding(resources: Collection[str], node_ids: Collection[str]) -> str:
    """Return lines that name the sessions that hold these resources on these nodes; "" if there are none."""
    return "\n".join(
        f"{name} of this script holds {', '.join(parts)}: call session.run(...), or leave its `with` first."
        for name, hosts in list(_open.items())
        if (parts := list(_in_words(hosts(), resources, node_ids)))
    )


def held_on(node_id: str) -> Mapping[str, float]:
    """Return the resources that all sessions together hold on this node."""
    held = Counter[str]()
    for hosts in list(_open.values()):
        for host in hosts():
            if host.node.node_id == node_id:
                held.update(host.bundle)
    return held


def _in_words(
    hosts: Sequence[Host], resources: Collection[str], node_ids: Collection[str]
) -> Iterator[str]:
    for host in hosts:
        amounts = {name: each for name, each in host.bundle.items() if name in resources}
        if amounts and host.node.node_id in node_ids:
            yield f"{amounts_in_words(amounts)} on {host.label}"


# A forked child has none of its parent's sessions.
empty_in_child(_open)
