"""The sessions of this script that hold room, for launches that wait for it."""

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
    """A session's hosts, which it may have none of."""

    @property
    def held(self) -> list[Held]: ...


_open: dict[str, Holder] = {}
"""The sessions that are open, by name."""


def note_open(name: str, holder: Holder) -> None:
    _open[name] = holder


def forget(name: str) -> None:
    _open.pop(name, None)


def holding(resources: Collection[str], node_ids: Collection[str]) -> str:
    """Name the sessions that hold any of these resources on these nodes; "" if none does."""
    return "\n".join(
        f"{name} of this script holds {', '.join(parts)}: call session.run(...), or leave its `with` first."
        for name, holder in list(_open.items())
        if (parts := list(_in_words(holder, resources, node_ids)))
    )


def held_on(node_id: str) -> Mapping[str, float]:
    """Return what the sessions hold on this node together."""
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
