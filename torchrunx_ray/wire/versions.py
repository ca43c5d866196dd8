"""Whether two processes of a launch can understand each other."""

import functools
import platform
from collections.abc import Mapping
from importlib import metadata

Versions = Mapping[str, str | None]


@functools.cache
def of_this_process() -> Versions:
    """Of Python and of the packages that matter between hosts; None where one is missing."""
    packages = ("torchrunx-ray", "ray", "cloudpickle", "torch")
    return {"Python": platform.python_version()} | {name: _version(name) for name in packages}


def problem_between(drivers: Versions, hosts: Versions) -> str | None:
    """Why the host cannot be used, with both versions; None where it can be."""
    for name, here in drivers.items():
        there = hosts.get(name)
        if here is None:
            continue  # such as a package imported from a folder, or a driver without torch
        if there is None:
            return f"{name} is not installed there; the driver has {here}."
        if name == "Python" and _minor(here) != _minor(there):
            return f"Python is {there} there and {here} in the driver: functions cannot travel."
        if name in ("ray", "torchrunx-ray") and here != there:
            return f"{name} is {there} there and {here} in the driver; install the same version."
    return None


def doubt_between(drivers: Versions, hosts: Versions) -> str | None:
    """What may make a difference: another torch, its build (such as +cpu) aside."""
    here, there = drivers.get("torch"), hosts.get("torch")
    if here is None or there is None or here.partition("+")[0] == there.partition("+")[0]:
        return None
    return f"torch is {there} there and {here} in the driver"


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
