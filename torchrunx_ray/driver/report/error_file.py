"""The content of a worker's error file. torch's `@record` writes such files, and other programs may."""

import json
from collections.abc import Mapping
from typing import Any

_MOST_SHOWN = 8192
"""Characters of an error file that are part of an exception's text: the last of a traceback, which ends with the error, or the first of a message."""


def parsed(recorded: str) -> dict[str, Any] | None:
    """Return the file's data in torch's form; None if nothing was recorded.

    Text that is not in this form becomes the message.
    """
    if not recorded:
        return None
    try:
        data: Any = json.loads(recorded)
    except (ValueError, RecursionError):
        data = None
    match data:
        case {"message": _}:
            return data
        case _:
            return {"message": recorded}


def message_of(data: Mapping[str, Any]) -> str:
    """Return the error without its traceback."""
    match data:
        case {"message": {"message": message}}:
            return str(message)
        case {"message": str(message)}:
            return message
        case _:
            return json.dumps(dict(data))


def in_words(data: Mapping[str, Any]) -> str:
    """Return the traceback of the error, which ends with its message, or else the message."""
    match data:
        case {"message": {"extraInfo": {"py_callstack": str(trace)}}}:
            return trace.rstrip()[-_MOST_SHOWN:]
        case _:
            return message_of(data)[:_MOST_SHOWN].rstrip()
