"""What the driver asks of a host's template."""

import functools
import logging
import os
import sys

from torchrunx_ray.driver import omp_threads
from torchrunx_ray.driver.options import Options
from torchrunx_ray.wire import environment
from torchrunx_ray.wire.messages import TemplateWanted

logger = logging.getLogger("torchrunx_ray")


def template_wanted(options: Options, *, one_worker: bool) -> TemplateWanted:
    """From the options and this process: its environment, interpreter and folder."""
    travelling = environment.chosen(os.environ, options.variable_patterns())
    is_asked_for = "OMP_NUM_THREADS" in options.named_variables()
    if not is_asked_for and omp_threads.were_set_by_ray():
        travelling.pop("OMP_NUM_THREADS", None)
    for name in sorted(options.named_variables() - os.environ.keys()):
        _warn_of_missing(name)
    return TemplateWanted(
        driver_variables=tuple(sorted(travelling.items())),
        explicit_variables=tuple(sorted(options.explicit_variables().items())),
        env_file=None if options.env_file is None else os.fspath(options.env_file),
        driver_executable=sys.executable,
        driver_cwd=_folder(),
        one_worker=one_worker,
        preload=tuple(options.preload),
        start_method=options.start_method,
    )


@functools.cache  # once per name and process
def _warn_of_missing(name: str) -> None:
    logger.warning(
        "extra_env_vars: the driver has no variable %s to send, so that workers have it only where their "
        "host or env_file sets it. Set it in the driver, or give its value: '%s=...'.",
        name,
        name,
    )


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted; agents fall back to their own, with a warning
        return "(deleted)"
