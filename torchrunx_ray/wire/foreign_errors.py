"""Decisions that hang on the English text of an error of Ray, torch or Python, which have no type for it.

Another version may say it in other words: tests/test_foreign_errors.py has each, with the versions that are installed.
"""

import re

_LOST_ARGUMENT = "At least one of the input arguments for this task could not be computed:"
_NO_MODULE = re.compile(r"No module named '(torchrunx_ray|cloudpickle)\b")
_ADDRESS = re.compile(r"Ray cluster at (\S+)")
_REFUSED_TOKEN = re.compile(r"AuthenticationError: ([^.\n]+)")
_LARGE_PROCESS = re.compile(r"^(\d+)\t([\d.]+)\t", re.MULTILINE)


def lost_argument(text: str) -> str | None:
    """Return why Ray has an argument of a call no more; None if the call itself failed."""
    return text.partition(_LOST_ARGUMENT)[2].strip() if _LOST_ARGUMENT in text else None


def is_of_another_cluster(text: str) -> bool:
    """Return True if Ray does not know a reference, which is of a cluster that the driver has left."""
    return "owner is unknown" in text


def is_store_full(text: str) -> bool:
    """Return True if neither Ray's store nor the disk behind it takes a value."""
    return "OutOfDiskError" in text or "ObjectStoreFullError" in text


def has_never_run(text: str) -> bool:
    """Return True if Ray gave an actor up before it ran."""
    return "never ran" in text


def refused_token(text: str) -> str:
    """Return the first sentence of Ray's reason to refuse a token; empty if there is none."""
    found = _REFUSED_TOKEN.search(text)
    return found[1] if found else ""


def address_of_cluster(text: str) -> str | None:
    """Return the address that an error of ray.init() names."""
    found = _ADDRESS.search(text)
    return found[1] if found else None


def largest_processes(text: str) -> dict[int, float]:
    """Return pid and gigabytes of the processes that a report of Ray's memory monitor lists."""
    return {int(pid): float(gigabytes) for pid, gigabytes in _LARGE_PROCESS.findall(text)}


def missing_package(text: str) -> str | None:
    """Return the package for want of which a process could not load our code."""
    found = _NO_MODULE.search(text)
    return found[1].replace("_", "-") if found else None


def is_second_group(error: BaseException) -> bool:
    """Return True for torch's error on a second default process group."""
    return isinstance(error, ValueError) and "default process group twice" in str(error)


def names_gloo(text: str) -> bool:
    """Return True if an error is gloo's, about a peer: it names the file that raised it."""
    return "gloo/transport/" in text
