"""A health server with the interface of torch's, which starts none."""

import time
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.health_check_server import HealthCheckServer

from torchrunx_ray.agent.health import HealthServer


class RayHealthCheckServer(HealthCheckServer):
    """Answers HTTP requests: 200 if the last progress is less than `timeout` seconds ago, else 503."""

    def __init__(self, alive_callback: Callable[[], int], port: int, timeout: int) -> None:
        super().__init__(alive_callback, port, timeout)
        self._server: HealthServer | None = None

    def start(self) -> None:
        """Open the port on all interfaces. Raises an error that says why if the port cannot be opened."""
        if self._server is None:
            self._server = HealthServer("0.0.0.0", self._port, self._describe)

    def stop(self) -> None:
        """Close the port. Safe to call again."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    @property
    def port(self) -> int:
        """The port that is open; with port 0, the one that was free."""
        return self._port if self._server is None else self._server.port

    def _describe(self) -> dict[str, Any]:
        try:
            silent_s = time.time() - self._alive_callback()
        except Exception as error:  # the user's callback
            reason = f"the callback of the health server raised {type(error).__name__}: {error}"
            return {"version": 1, "healthy": False, "reason": reason, "silent_s": None}
        healthy = silent_s < self._timeout
        reason = "" if healthy else f"no progress for {silent_s:.0f} s"
        return {"version": 1, "healthy": healthy, "reason": reason, "silent_s": round(silent_s, 1)}


def create_healthcheck_server(
    alive_callback: Callable[[], int], port: int, timeout: int
) -> RayHealthCheckServer:
    """Return a health server; `start` opens its port."""
    return RayHealthCheckServer(alive_callback, port, timeout)
