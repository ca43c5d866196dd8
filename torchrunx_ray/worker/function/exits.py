"""One-line description of a `sys.exit` in the function."""

import itertools
import os
import sys
import sysconfig
import types
from collections.abc import Iterable
from typing import Any

_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (
        os.path.dirname(os.__file__),
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)
_ANY_LIBRARY = ("site-packages", "dist-packages")
"""Folders of packages that are installed elsewhere, such as in the user's home."""


def describe(error: SystemExit, frames: Iterable[tuple[types.FrameType, int]]) -> str:
    """Describe the exit: its code, the user's line that led to it, and argparse's error message.

    `frames` are those of `traceback.walk_tb`.
    """
    frames = list(frames)
    said = f"called sys.exit({error.code!r})"
    # The user may override a parser's error(); the line that led to the exit is above that call.
    above = itertools.takewhile(lambda each: _usage_error(each[0]) is None, frames)
    own = [(frame.f_code, line) for frame, line in above if not _is_of_a_library(frame.f_code)]
    if own:
        code, line = own[-1]
        said += f" in {code.co_name} ({os.path.basename(code.co_filename)}:{line})"
    usage_errors = [found for frame, _ in frames if (found := _usage_error(frame)) is not None]
    return f"{said}: {usage_errors[-1]}" if usage_errors else said


def _is_of_a_library(code: types.CodeType) -> bool:
    file = code.co_filename
    is_installed = any(f"{os.sep}{each}{os.sep}" in file for each in _ANY_LIBRARY)
    return is_installed or file.startswith((*_LIBRARIES, "<frozen "))


def _usage_error(frame: types.FrameType) -> str | None:
    """Return the message of an `ArgumentParser.error` call, since the raised exception does not have it."""
    argparse: Any = sys.modules.get("argparse")
    code = frame.f_code
    if argparse is None or code.co_name != "error" or code.co_argcount != 2:
        return None
    named: dict[str, Any] = frame.f_locals
    parser, message = code.co_varnames[:2]
    if not isinstance(named.get(parser), argparse.ArgumentParser):
        return None
    return f"{named[parser].prog}: error: {named.get(message)}"
