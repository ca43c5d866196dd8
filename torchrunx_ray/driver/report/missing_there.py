"""Advice for errors of workers that lack a module or variable that the driver has."""

import importlib.util
import logging
import os
import re
import shlex
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire.environment import forbidden

logger = logging.getLogger("torchrunx_ray")

_IN_ENVIRON = re.compile(r'File "[^"]*\bos(\.py|>)", line \d+, in __getitem__')


def advice(error: BaseException, traceback: str) -> str | None:
    """Return advice about a module or variable that a worker lacked, and how to send it; None for other errors.

    Exceptions here are only logged: a worker's error may have attributes of any type, and the user's import
    finders may fail.
    """
    try:
        if isinstance(error, PayloadError):
            name = error.missing_module
            return None if name is None else _of_module(name) or _of_unknown_module(name)
        if isinstance(error, ModuleNotFoundError):
            return None if error.name is None else _of_module(error.name)
        if isinstance(error, ImportError):
            return None if None in (error.name, error.path) else _of_other(error.name, error.path)
        if type(error) is KeyError and _was_raised_by_environ(traceback):
            return _of_variable(error.args[0])
    except Exception as reason:
        logger.debug("no advice on %s", type(error).__name__, exc_info=reason)
    return None


def _was_raised_by_environ(traceback: str) -> bool:
    frames = re.findall(r"^ *File .*$", traceback, re.MULTILINE)
    return bool(frames) and _IN_ENVIRON.search(frames[-1]) is not None


def _of_variable(name: str) -> str | None:
    if name not in os.environ or forbidden(name):
        return None
    return (
        f"The driver has the variable {name}, but no pattern sends it to workers. Launch with "
        f'extra_env_vars=["{name}"], or with extra_env_vars="all" to send every variable, as torchrun does.'
    )


def _of_unknown_module(name: str) -> str:
    return (
        f"The driver does not find {name} either. Install it on the hosts, or let Ray install it: "
        "ray.init(runtime_env={'pip': [...]})."
    )


def _of_module(name: str) -> str | None:
    """Return advice that names the driver's copy of the module, and how to bring it to the hosts."""
    top = name.partition(".")[0]
    path = _path_here(top)
    if path is None or _is_standard(path):
        return None
    if _is_installed(path):
        return (
            f"The driver has {top} installed, in {path}. Install it on the hosts as well, or let Ray "
            "install it: ray.init(runtime_env={'pip': [...]})."
        )
    module, root = str(path), str(path.parent)
    if path.parent in _python_path():
        first = (
            "That folder is in the driver's PYTHONPATH. Workers search it too, if their host has the "
            "folder. To send the code"
        )
    else:
        first = (
            f"If the hosts have that folder, run {_with_python_path(root)}: folders that a script adds to "
            "sys.path are not passed on. To send the code instead"
        )
    return (
        f"The driver has {top} in {path}. {first}, call before the launch: "
        f"ray.init(runtime_env={{'py_modules': [{module!r}]}}), or use {{'working_dir': {root!r}}} for the whole "
        f"folder. In a job, pass the same to `ray job submit --runtime-env-json`."
    )


def _with_python_path(folder: str) -> str:
    """Return the driver's command with this folder in PYTHONPATH."""
    script = sys.argv[0] if sys.argv and sys.argv[0].endswith(".py") else "..."
    searched = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    return f"PYTHONPATH={shlex.quote(searched)} python {script}"


def _of_other(name: Any, worker_path: Any) -> str | None:
    """Return the paths of two modules with the same name: the host's module may be older."""
    path = _path_here(name.partition(".")[0])
    if path is None or _is_standard(path) or Path(worker_path).is_relative_to(path):
        return None
    return f"The worker has {name} in {worker_path}, and the driver has it in {path}."


def _path_here(top: str) -> Path | None:
    """Return the driver's file of a module, or folder of a package."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    if folders:
        return Path(folders[0])
    return Path(spec.origin) if spec.has_location and spec.origin is not None else None


def _is_standard(path: Path) -> bool:
    return path.is_relative_to(sysconfig.get_path("stdlib")) and not _is_installed(path)


def _is_installed(path: Path) -> bool:
    folders = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")]
    return any(path.is_relative_to(folder) for folder in folders)


def _python_path() -> list[Path]:
    path = os.environ.get("PYTHONPATH")
    return [Path(entry).absolute() for entry in path.split(os.pathsep)] if path else []
