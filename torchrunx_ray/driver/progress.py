"""How far a run is."""

from typing import Protocol

from torchrunx_ray.driver.stacks import Stacks


class HasStacks(Protocol):
    """An attempt, as far as the user of its run may ask it."""

    async def stacks(self) -> Stacks: ...


class Progress:
    """What the user of a run may ask for while it goes on, or when it was stopped.

    Written in the background loop by whoever carries the run on.
    """

    def __init__(self) -> None:
        self.attempt: HasStacks | None = None
        self.stacks_at_stop = Stacks({})
        """What the workers were doing when the run was cancelled."""

    async def stacks(self) -> Stacks:
        return Stacks({}) if self.attempt is None else await self.attempt.stacks()
