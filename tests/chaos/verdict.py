"""Checks of a training after it was disturbed."""

from collections.abc import Sequence
from pathlib import Path

from tests.chaos.blows import EXPLAINS, Blow
from tests.chaos.training import train_alone
from torchrunx_ray.driver.report.history import AttemptRecord

_EARLY_S = 1.0
"""Time by which a blow may come before the attempt begins that it ends."""


def wrong_with_result(values: Sequence[tuple[int, str]]) -> list[str]:
    """Compare what the ranks returned with an undisturbed training of as many steps."""
    if len(set(values)) != 1:
        return [f"the ranks returned different states: {values}"]
    step, digest = values[0]
    undisturbed = train_alone(step)
    return [] if digest == undisturbed else [f"step {step}: {digest}, undisturbed {undisturbed}"]


def wrong_with_journal(journal: Path) -> list[str]:
    """Check that a step has one result, and that no worker ran beside those of a later attempt."""
    wrong: list[str] = []
    digests: dict[str, str] = {}
    newest = 0
    for line in journal.read_text().splitlines():
        attempt, rank, step, digest = line.split()
        if int(attempt) < newest:
            wrong.append(f"rank {rank} of attempt {attempt} took a step beside attempt {newest}")
        newest = max(newest, int(attempt))
        if digests.setdefault(step, digest) != digest:
            wrong.append(f"step {step} of attempt {attempt} on rank {rank}: {digest}")
    return wrong


def unexplained(attempts: Sequence[AttemptRecord], blows: Sequence[Blow]) -> list[str]:
    """Return the attempts that ended although nothing was done to them. Each blow explains one end."""
    left = sorted(blows, key=lambda blow: blow.at)
    wrong: list[str] = []
    for attempt in attempts[:-1]:
        causes = [blow for blow in left if _explains(blow, attempt)]
        if causes:
            left.remove(causes[0])
        else:
            wrong.append(f"attempt {attempt.number} {attempt.why}: {attempt.failure}")
    return wrong


def _explains(blow: Blow, attempt: AttemptRecord) -> bool:
    if attempt.why not in EXPLAINS[blow.kind] or blow.at > attempt.ended:
        return False
    # A node may join long before the run may grow.
    return attempt.why == "resized" or blow.at > attempt.begun - _EARLY_S
