"""What an agent knows of its host: who it is, its paths, its environment."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from torchrunx_ray.wire import environment
from torchrunx_ray.wire.messages import TemplateWanted


def template_environment(wanted: TemplateWanted, ray_address: str) -> dict[str, str]:
    """Everything that a template, and so every worker, starts with."""
    made = environment.for_template(
        os.environ,
        dict(wanted.driver_variables),
        read_env_file(wanted.env_file) if wanted.env_file else {},
        dict(wanted.explicit_variables),
        same_interpreter=sys.executable == wanted.driver_executable,
        one_worker=wanted.one_worker,
    )
    made["RAY_ADDRESS"] = ray_address
    return made


def read_env_file(path: str) -> Mapping[str, str]:
    """What bash exports after it has sourced the file."""
    script = 'set -a; source "$1" >&2 && env -0'
    done = subprocess.run(["bash", "-c", script, "bash", path], capture_output=True, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"env_file={path!r} could not be sourced by bash (exit code {done.returncode}):\n"
            + done.stderr.decode(errors="replace").rstrip()
        )
    pairs = (
        line.partition("=") for line in done.stdout.decode(errors="replace").split("\0") if line
    )
    return {name: value for name, _, value in pairs if os.environ.get(name) != value}


def working_directory(wanted: TemplateWanted, in_job_working_dir: bool) -> tuple[str, str | None]:
    """Where the function runs, and a warning where that is not where the driver is."""
    here = os.getcwd()
    if in_job_working_dir:
        return here, None
    if Path(wanted.driver_cwd).is_dir():
        return wanted.driver_cwd, None
    return here, (
        f"The driver's folder {wanted.driver_cwd} does not exist here; the function runs in {here}."
    )
