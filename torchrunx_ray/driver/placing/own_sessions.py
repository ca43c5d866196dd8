"""Open sessions of this script, named in messages of launches that wait for their resources."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.errors import amounts_in_words


@dataclass(frozen=True)
class Held:
    """Resources that a session holds on one node."""

    node_id: str
    hostname: str
    amounts: Mapping[str, float]


class Holder(Protocol):
    """A session's hosts, if it has any."""

    @property
    def held(self) -> list[Held]: ...


_open: dict[str, Holder] = {}
"""Open sessions by name."""


def note_open(name: str, holder: Holder) -> None:
    _open[name] = holder


def forget(name: str) -> None:
    _open.pop(name, None)


def holding(resources: Collection[str], node_ids: Collection[str]) -> str:
    """Return lines that name the sessions that hold these resources on these nodes; "" if there are none."""
    return "\n".join(
        f"{name} of this script holds {', '.join(parts)}: call session.run(...), or leave its `with` first."
        for name, holder in list(_open.items())
        if (parts := list(_in_words(holder, resources, node_ids)))
    )


def held_on(node_id: str) -> Mapping[str, float]:
    """Return the resources that all sessions together hold on this node."""
    held = Counter[str]()
    for holder in list(_open.values()):
        for host in holder.held:
            if host.node_id == node_id:
                held.update(host.amounts)
    return held


def _in_words(
    holder: Holder, resources: Collection[str], node_ids: Collection[str]
) -> Iterator[str]:
    for host in holder.held:
        amounts = {name: each for name, each in host.amounts.items() if name in resources}
        if amounts and host.node_id in node_ids:
            yield f"{amounts_in_words(amounts)} on {host.hostname}"


# A forked child has none of its parent's sessions.
in_child(_open.clear)
