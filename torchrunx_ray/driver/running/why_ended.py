"""Reasons for which attempts end, by the evidence that the driver has."""

from collections.abc import Collection

from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import Why
from torchrunx_ray.driver.running.stop_request import StopRequest


def why_returned(request: StopRequest, *, have_all_returned: bool) -> Why:
    """Return why an attempt without a failure ended.

    Functions that returned without a look at the request to stop have done their work.
    """
    is_done = have_all_returned and not request.seen_by
    return "returned" if is_done else _as_asked(request) or "returned"


def why_failed(failures: Failures, request: StopRequest, lost: Collection[str]) -> Why:
    """Return why an attempt with failures ended. `lost` has the names of hosts that are lost, or draining.

    A failure with a cause of its own counts, even if a host is lost later, or if the function was asked to stop.
    """
    if failures.have_own_cause(lost):
        return "failed"
    if request.was_made_before(failures.first_ns) and (why := _as_asked(request)):
        return why
    return "host lost" if lost else "failed"


def _as_asked(request: StopRequest) -> Why | None:
    if request.asked is None or request.asked.reason == "cancel":
        return None
    return "resized" if request.asked.reason == "resize" else "drained"
