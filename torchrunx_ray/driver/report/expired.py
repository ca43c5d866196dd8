"""Scopes of torch's `expires` that a worker has not left in time, in words."""

from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.errors import signal_name
from torchrunx_ray.wire.messages import ScopeExpired


def what_expired(expired: ScopeExpired) -> str:
    """Return what happened, to follow the name of the rank."""
    whose = (
        "" if expired.in_pid == expired.pid else f" (entered by its child process {expired.in_pid})"
    )
    did = (
        f"so the watchdog sent {signal_name(expired.signal)}"
        if expired.signal > 0
        else "which asks for no signal"
    )
    return f"has not left the scope {expired.scope}{whose} in {expired.seconds:.3g} s, {did}"


def in_words(expired: ScopeExpired) -> str:
    """Return what happened, and the line where the worker was at the deadline."""
    where = Stacks({0: expired.stacks}).summary.partition(": ")[2]
    return f"{what_expired(expired)}\nAt the deadline it was in {where}"
