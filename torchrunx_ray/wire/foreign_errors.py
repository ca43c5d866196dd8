"""Decisions based on the English text of an error of Ray, torch or Python, if there is no type for the error.

Another version may change the text. tests/test_foreign_errors.py checks each text with the installed versions.
"""

import re

_LOST_ARGUMENT = "At least one of the input arguments for this task could not be computed:"
_NO_MODULE = re.compile(r"No module named '(torchrunx_ray|cloudpickle)\b")
_ADDRESS = re.compile(r"Ray cluster at (\S+)")
_REFUSED_TOKEN = re.compile(r"AuthenticationError: ([^.\n]+)")
_LARGE_PROCESS = re.compile(r"^(\d+)\t([\d.]+)\t", re.MULTILINE)


def lost_argument(text: str) -> str | None:
    """Return Ray's reason for the loss of a call's argument; None if the call itself failed."""
    return text.partition(_LOST_ARGUMENT)[2].strip() if _LOST_ARGUMENT in text else None


def is_of_another_cluster(text: str) -> bool:
    """Return True if Ray does not know a reference, since it belongs to a cluster that the driver has left."""
    return "owner is unknown" in text


def is_store_full(text: str) -> bool:
    """Return True if neither Ray's object store nor the disk behind it has room for a value."""
    return "OutOfDiskError" in text or "ObjectStoreFullError" in text


def says_process_died(text: str) -> bool:
    """Return True if Ray knows that an actor's process is gone, and does not only take its node for dead."""
    return "its worker process has died" in text


def has_never_run(text: str) -> bool:
    """Return True if Ray gave up on an actor before it ran, and its node lives."""
    cancelled = "never ran" in text or "Actor creation cancelled" in text
    return cancelled and "its node has died" not in text


def refused_token(text: str) -> str:
    """Return the first sentence of Ray's reason for refusing a token; empty if there is none."""
    found = _REFUSED_TOKEN.search(text)
    return found[1] if found else ""


def address_of_cluster(text: str) -> str | None:
    """Return the cluster's address from an error of ray.init(); None if the error has none."""
    found = _ADDRESS.search(text)
    return found[1] if found else None


def largest_processes(text: str) -> dict[int, float]:
    """Return gigabytes by pid for the processes in a report of Ray's memory monitor."""
    return {int(pid): float(gigabytes) for pid, gigabytes in _LARGE_PROCESS.findall(text)}


def missing_package(text: str) -> str | None:
    """Return the missing package that kept a process from loading our code; None if none is missing."""
    found = _NO_MODULE.search(text)
    return found[1].replace("_", "-") if found else None


def is_second_group(error: BaseException) -> bool:
    """Return True for torch's error about a second default process group."""
    return isinstance(error, ValueError) and "default process group twice" in str(error)


def names_gloo(text: str) -> bool:
    """Return True if gloo raised the error because of a peer; the text then names a file of gloo's transport."""
    return "gloo/transport/" in text
