"""The port for health checks that a launch asks for."""

from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.wire.environment import HEALTH_PORT
from torchrunx_ray.wire.messages import TemplateWanted


def health_port(options: Options, wanted: TemplateWanted) -> int | None:
    """Return the port of the option, or else of the workers' environment. Raises ValueError for another value."""
    if options.health_check_port is not None:
        return options.health_check_port
    text = {**dict(wanted.driver_variables), **dict(wanted.explicit_variables)}.get(HEALTH_PORT)
    if not text:
        return None
    if text.isascii() and text.isdigit() and int(text) < 65536:
        return int(text)
    raise ValueError(
        f"{HEALTH_PORT}={text!r} in the workers' environment: expected a port from 0 to 65535, where 0 stands for any free "
        "one."
    )
