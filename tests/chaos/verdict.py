"""Checks of a training after it was disturbed."""

from collections.abc import Sequence

from tests.chaos.blows import EXPLAINS, NODE_LIVES, SILENT, Blow
from tests.chaos.journal import Journal
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


def wrong_with_journal(journal: Journal) -> list[str]:
    """Check that a step has one result, and that no worker ran beside those of a later attempt."""
    wrong: list[str] = []
    digests: dict[int, str] = {}
    newest = 0
    for step in journal.steps():
        who = f"rank {step.rank} of attempt {step.attempt}"
        if step.attempt < newest:
            wrong.append(f"{who} took a step beside attempt {newest}")
        newest = max(newest, step.attempt)
        if digests.setdefault(step.number, step.digest) != step.digest:
            wrong.append(f"step {step.number} of {who}: {step.digest}")
    return wrong


def causes(attempts: Sequence[AttemptRecord], blows: Sequence[Blow]) -> dict[int, Blow]:
    """Return the blow that ended each attempt, by the attempt's number. Each blow explains one end."""
    by_aim = _matched(attempts, blows, prefer_aim=True)
    by_time = _matched(attempts, blows, prefer_aim=False)
    return by_aim if len(by_aim) == len(by_time) else by_time


def _matched(
    attempts: Sequence[AttemptRecord], blows: Sequence[Blow], *, prefer_aim: bool
) -> dict[int, Blow]:
    """Explain as many ends as possible.

    With `prefer_aim`, blows on the attempt itself are likelier causes than others, and idle processes less likely ones.
    """
    left = list(blows)
    found: dict[int, Blow] = {}
    for attempt in attempts:
        # Of several nodes that have joined, the last one is the likeliest cause of a resize.
        left.sort(key=lambda blow: (blow.over_at, -blow.at))
        possible = [blow for blow in left if _explains(blow, attempt)]
        if prefer_aim:
            possible.sort(key=lambda blow: (blow.attempt != attempt.number, blow.kind in SILENT))
        if possible:
            found[attempt.number] = possible[0]
            left.remove(possible[0])
            left += _return_of_host(possible[0], attempt)
    return found


def _return_of_host(blow: Blow, attempt: AttemptRecord) -> list[Blow]:
    """Return what follows if a host was lost although its node lives: the node can be used again, as if it joined."""
    if attempt.why != "host lost" or blow.kind not in NODE_LIVES:
        return []
    assert attempt.ended is not None
    return [Blow("join", blow.rank, attempt.number, attempt.ended)]


def unexplained(attempts: Sequence[AttemptRecord], blows: Sequence[Blow]) -> list[str]:
    """Return the attempts that ended although nothing was done to them."""
    ended = attempts[:-1]
    explained = causes(ended, blows)
    return [
        f"attempt {attempt.number} {attempt.why}: {attempt.failure}"
        for attempt in ended
        if attempt.number not in explained
    ]


def _explains(blow: Blow, attempt: AttemptRecord) -> bool:
    assert attempt.ended is not None
    is_of_its_time = blow.over_at > attempt.begun - _EARLY_S and blow.at < attempt.ended
    return is_of_its_time and attempt.why in EXPLAINS[blow.kind]
