"""What the driver asks of a host's template."""

import os
import sys

from torchrunx_ray.driver.options import Options
from torchrunx_ray.wire import environment
from torchrunx_ray.wire.messages import TemplateWanted


def template_wanted(options: Options, *, one_worker: bool) -> TemplateWanted:
    """From the options and this process: its environment, interpreter and folder."""
    travelling = environment.chosen(os.environ, options.variable_patterns())
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


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted; agents fall back to their own, with a warning
        return "(deleted)"
