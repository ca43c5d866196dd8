"""The template that the driver requests of a host."""

import functools
import logging
import os
import sys

from torchrunx_ray.driver.call.health_port import health_port
from torchrunx_ray.driver.cluster import omp_threads
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.wire import environment
from torchrunx_ray.wire.messages import TemplateWanted

logger = logging.getLogger("torchrunx_ray")


def template_wanted(options: Options) -> TemplateWanted:
    """Take a snapshot of this process: its environment, interpreter and working directory.

    `one_worker` is set later, for each host, by its placement.
    """
    travelling = environment.chosen(os.environ, options.variable_patterns())
    is_asked_for = "OMP_NUM_THREADS" in options.named_variables()
    if not is_asked_for and omp_threads.were_set_by_ray():
        travelling.pop("OMP_NUM_THREADS", None)
    for name in sorted(options.named_variables() - os.environ.keys()):
        _warn_of_missing(name)
    if (problem := environment.too_large(travelling)) is not None:
        raise ValueError(f"the driver's environment: {problem}")
    wanted = TemplateWanted(
        driver_variables=tuple(sorted(travelling.items())),
        explicit_variables=tuple(sorted(options.explicit_variables().items())),
        env_file=None if options.env_file is None else os.fspath(options.env_file),
        driver_executable=sys.executable,
        driver_cwd=_folder(),
        one_worker=False,
        preload=tuple(options.preload),
        start_method=options.start_method,
    )
    health_port(options, wanted)  # raises an error before anything starts
    return wanted


def differences(wanted: TemplateWanted, other: TemplateWanted) -> list[str]:
    """Return how the wanted template differs from another one.

    Names of variables are shown, but not their values, which may be secrets.
    """
    found = [
        f"{whose} {name}"
        for whose, here, there in (
            ("the driver's variable", wanted.driver_variables, other.driver_variables),
            ("extra_env_vars:", wanted.explicit_variables, other.explicit_variables),
        )
        for name in sorted({name for name, _ in {*here} ^ {*there}})
    ]
    found += [
        f"{what} {getattr(wanted, field)!r} instead of {getattr(other, field)!r}"
        for field, what in _SHOWN.items()
        if getattr(wanted, field) != getattr(other, field)
    ]
    if wanted.one_worker != other.one_worker:
        found.append("one worker on the host instead of several, or several workers instead of one")
    return found


_SHOWN = {
    "driver_cwd": "the working directory",
    "env_file": "env_file",
    "preload": "preload",
    "start_method": "start_method",
}


@functools.cache  # once per name and process
def _warn_of_missing(name: str) -> None:
    logger.warning(
        "extra_env_vars: the driver has no variable %s to send. Workers have this variable only if their "
        "host or env_file sets it. Set it in the driver, or give its value: '%s=...'.",
        name,
        name,
    )


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # deleted; agents then use their own directory, with a warning
        return "(deleted)"
