"""Scopes of torch's `expires` that a worker has not left in time, in words."""

from torchrunx_ray.driver.report.stacks import threads_in_words
from torchrunx_ray.errors import ExpiredScope, signal_name
from torchrunx_ray.wire.messages import ScopeExpired


def scope_of(expired: ScopeExpired) -> ExpiredScope:
    return ExpiredScope(expired.scope, _seconds(expired), expired.in_pid, expired.stacks)


def what_expired(expired: ScopeExpired) -> str:
    """Return what happened, to follow the name of the rank."""
    whose = "" if _is_own(expired) else f" (entered by its child process {expired.in_pid})"
    did = "which asks for no signal"
    if expired.signal > 0:
        did = f"so the watchdog sent {signal_name(expired.signal)}"
    return f"has not left the scope {expired.scope}{whose} in {_seconds(expired):g} s, {did}"


def in_words(expired: ScopeExpired) -> str:
    """Return what happened, and the line of each thread at the deadline."""
    who = "it" if _is_own(expired) else "the rank's own process"
    main, *others = threads_in_words(expired.stacks)
    if not main:
        return f"{what_expired(expired)}\nAt the deadline {who} did not tell where it was."
    lines = [f"At the deadline {who} was in {main}", *(f"  a thread: {other}" for other in others)]
    return "\n".join([what_expired(expired), *lines])


def _is_own(expired: ScopeExpired) -> bool:
    return expired.in_pid == expired.pid


def _seconds(expired: ScopeExpired) -> float:
    """Return the time that the function asked for: the request took some milliseconds to arrive."""
    return max(0.0, round(expired.seconds, 1 if expired.seconds > 10 else 2))
