"""Checks that the versions on driver and hosts are compatible."""

import functools
import platform
from collections.abc import Mapping
from importlib import metadata

from torchrunx_ray.version import __version__
from torchrunx_ray.wire import foreign_errors

Versions = Mapping[str, str | None]


@functools.cache
def of_this_process() -> Versions:
    """Return the versions of Python and of the packages that must match; None for a missing package."""
    return {
        "Python": platform.python_version(),
        "torchrunx-ray": __version__,
        **{name: _version(name) for name in ("ray", "cloudpickle", "torch")},
    }


def problem_between(drivers: Versions, hosts: Versions) -> str | None:
    """Describe why the host's versions rule it out; return None if the host can be used."""
    for name, here in drivers.items():
        there = hosts.get(name)
        if here is None:
            continue  # for example, a package imported from a folder, or a driver without torch
        if there is None:
            return f"{name} is not installed there; the driver has {here}."
        if name == "Python" and here.split(".")[:2] != there.split(".")[:2]:
            return (
                f"Python is {there} there and {here} in the driver; install the same minor version."
            )
        if name in ("ray", "torchrunx-ray") and here != there:
            return f"{name} is {there} there and {here} in the driver; install the same version."
    return None


def missing_package(evidence: str, drivers: Versions) -> str | None:
    """Describe the missing package that kept an agent from being imported on its host; None if there is none."""
    name = foreign_errors.missing_package(evidence)
    if name is None:
        return None
    here = drivers.get(name)
    return (
        f"{name} is not installed in the Python that Ray runs there; the driver has {here}. Install "
        "the same version there, or let Ray install it: ray.init(runtime_env={'pip': [...]})."
    )


def doubt_between(drivers: Versions, hosts: Versions) -> str | None:
    """Return a warning if the torch versions differ, ignoring the build (such as +cpu)."""
    here, there = drivers.get("torch"), hosts.get("torch")
    if here is None or there is None or here.partition("+")[0] == there.partition("+")[0]:
        return None
    return f"torch is {there} there and {here} in the driver"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
