"""Analysis of the cluster's room for a placement group, now or ever."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import PlacementGroup

from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.autoscaler import Outlook, outlook
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import own_sessions, placement_group, returning
from torchrunx_ray.driver.placing.feasibility import (
    is_in,
    unplaced,
    what_no_node_is,
    why_impossible,
)
from torchrunx_ray.driver.placing.plan import Plan
from torchrunx_ray.driver.placing.reminders import For
from torchrunx_ray.errors import PlacementError, amounts_in_words, counted, room_table

logger = logging.getLogger("torchrunx_ray")


class HostLeft(Exception):
    """Raised if a chosen host left the cluster while the launch waited for room.

    `error` is the error to raise if no other host fits.
    """

    def __init__(self, error: PlacementError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Shortage:
    """A snapshot of a waiting group's needs, the cluster's resources, and resources that may come."""

    options: Options
    plan: Plan
    nodes: Sequence[Node]
    left: Sequence[Node]
    """Nodes that left, and may soon return."""
    free_by_node: Mapping[str, Mapping[str, float]]
    scheduling_state: str
    outlook: Outlook

    @classmethod
    async def now(
        cls, group: PlacementGroup, options: Options, plan: Plan, connection: Connection
    ) -> "Shortage":
        untyped_group: Any = group
        return cls(
            options,
            plan,
            await connection.call(inventory.live_nodes),
            await returning.nodes_that_left(connection),
            await connection.call(connection.inside, inventory.free_by_node),
            await connection.call(placement_group.scheduling_state, group),
            await connection.call(outlook, untyped_group.id.hex()),
        )

    @property
    def infeasible(self) -> bool:
        return self.scheduling_state == "INFEASIBLE"

    @property
    def is_placed(self) -> bool:
        """True if the group is placed. Its resources then no longer count as free."""
        return self.scheduling_state == "FINISHED"

    @property
    def is_being_reserved(self) -> bool:
        """True if Ray has not decided yet, and may be reserving resources on the nodes."""
        return self.scheduling_state in placement_group.UNDECIDED

    def check(self, waited_s: float, limit_s: float) -> None:
        """Raise HostLeft, or PlacementError if waiting is useless or the time is over."""
        gone = self._host_that_left()
        if gone is not None:
            problem = f"{gone}, chosen as one of the launch's hosts, left the cluster while the launch waited."
            raise HostLeft(self._error(problem, "Bring it back, or leave it out of hostnames."))
        never = self._why_never()
        if never is not None and self.waits_for is not For.RETURN:
            raise self._error(
                f"The Ray cluster can never hold this launch: {never}.", self._instead()
            )
        if waited_s >= limit_s:
            starting = self._news()
            raise self._error(
                f"The Ray cluster had no room for this launch within placement_timeout={limit_s:g} s"
                + (f"; {starting}." if starting else "."),
                self._own_sessions_or_what_to_try(),
            )

    def _instead(self) -> str:
        if len(self.plan.hosts) > len(self.nodes) and (advice := inventory.other_hosts()):
            return advice
        if what_no_node_is(self.nodes, self.options) is None:
            return "Ask for fewer hosts or workers, or for less per worker."
        return (
            "Change label_selector or accelerator_type to what a node has, or add a matching node."
        )

    def _own_sessions(self) -> str:
        """Return lines that name this script's sessions that hold the missing resources."""
        names = {
            name
            for bundle in self._without_room(self.free_by_node)
            for name in self._short_of(bundle)
        }
        pinned = [host.node for host in self.plan.hosts if host.node is not None]
        usable = pinned if len(pinned) == len(self.plan.hosts) else self.nodes
        return own_sessions.holding(names, {node.node_id for node in usable})

    def _own_sessions_or_what_to_try(self) -> str:
        """Return advice to leave this script's sessions, and further advice if that is not enough."""
        sessions = self._own_sessions()
        if not sessions:
            return self._what_to_try()
        without_sessions = {
            node_id: Counter(free) + Counter(own_sessions.held_on(node_id))
            for node_id, free in self.free_by_node.items()
        }
        if not self._without_room(without_sessions):
            return sessions
        return f"{sessions}\nThese resources are not enough. {self._what_to_try()}"

    def _without_room(
        self, free_by_node: Mapping[str, Mapping[str, float]]
    ) -> Sequence[Mapping[str, float]]:
        """Return the bundles that do not fit into the free resources: of their pinned node, else of any node."""
        on_their_node = [
            host.bundle
            for host in self.plan.hosts
            if host.node and not is_in(host.bundle, free_by_node.get(host.node.node_id, {}))
        ]
        return on_their_node or unplaced(self._wanted(), list(free_by_node.values()))

    def _short_of(self, bundle: Mapping[str, float]) -> Sequence[str]:
        """Return the resources of which no node has enough free; all of the bundle if there are none."""
        free = self.free_by_node.values()
        short = [
            name
            for name, amount in bundle.items()
            if all(node.get(name, 0) < amount for node in free)
        ]
        return short or list(bundle)

    def _what_to_try(self) -> str:
        if self.outlook.can_grow:
            return (
                "Has the autoscaler reached its max_workers, and does it know a node type that is large "
                "enough? Check with `ray status`. Wait longer, or ask for less."
            )
        if not unplaced(self._wanted(), list(self.free_by_node.values())):
            return "The missing resources are free now: launch again."
        return (
            "Others hold the missing resources: see `ray list placement-groups`, "
            "`ray list actors` and `ray list tasks`. Wait longer, or ask for less."
        )

    def report(self, name: str, waited_s: float, limit_s: float, others: str) -> None:
        starting = self._news()
        sessions = self._own_sessions()
        logger.warning(
            "%s is waiting for %s, %.0f s%s so far%s%s\n%s%s",
            name,
            "Ray to reserve its room (is a node slow to answer Ray's head?)"
            if self.is_being_reserved
            else "room in the Ray cluster",
            waited_s,
            "" if self.options.placement_timeout is None else f" of {limit_s:g}",
            f"; {starting}" if starting else "",
            others,
            room_table(self._wanted(), self._free(), self._total()),
            f"\n{sessions}" if sessions else "",
        )

    def in_brief(self) -> str:
        """Return words such as "1/2 hosts, waiting for 8 GPU on 1 more host"."""
        wanted = self._wanted()
        missing = unplaced(wanted, list(self.free_by_node.values()))
        text = f"{len(wanted) - len(missing)}/{len(wanted)} hosts"
        if not missing:
            return text  # the free resources are fragmented, or were freed just now
        more = counted(len(missing), "more host")
        return f"{text}, waiting for {amounts_in_words(missing[0])} on {more}"

    def _host_that_left(self) -> str | None:
        live = {node.node_id for node in self.nodes}
        for host in self.plan.hosts:
            if host.node is not None and host.node.node_id not in live:
                return host.label or host.node.name
        return None

    def _why_never(self) -> str | None:
        reason = why_impossible(self._wanted(), self.nodes, self.options)
        if self.outlook.can_grow:
            # While no node may be added, the autoscaler also refuses groups that only wait for others.
            if not self.outlook.refused or (reason is None and not self.infeasible):
                return None
            refusal = "its autoscaler may not start any suitable nodes"
            return f"{refusal}; {reason}" if reason else refusal
        if reason is None and self.infeasible:
            return (
                "Ray finds no way to place the hosts with this placement_strategy and these labels"
            )
        return reason

    @property
    def waits_for(self) -> For:
        """Return For.RETURN if only nodes that left recently are missing, else For.ROOM."""
        if not self.left or self._why_never() is None:
            return For.ROOM
        with_them = [*self.nodes, *self.left]
        return For.ROOM if why_impossible(self._wanted(), with_them, self.options) else For.RETURN

    def _news(self) -> str:
        """Return a text about nodes that may join the cluster."""
        if self.waits_for is For.RETURN:
            return returning.in_words(self.left)
        if not self.outlook.can_grow:
            return ""
        nodes = ", ".join(f"{count} x {kind}" for kind, count in self.outlook.starting.items())
        return (
            f"the autoscaler is starting {nodes}"
            if nodes
            else "the autoscaler is not starting any node"
        )

    def _wanted(self) -> list[dict[str, float]]:
        return [host.bundle for host in self.plan.hosts]

    def _free(self) -> dict[str, Mapping[str, float]]:
        return {
            node.name: self.free_by_node[node.node_id]
            for node in self.nodes
            if node.node_id in self.free_by_node
        }

    def _total(self) -> dict[str, Mapping[str, float]]:
        return {node.name: node.resources for node in self.nodes}

    def _error(self, problem: str, advice: str) -> PlacementError:
        return PlacementError(
            problem, wanted=self._wanted(), free=self._free(), total=self._total(), advice=advice
        )
