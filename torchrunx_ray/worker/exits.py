"""A `sys.exit` of the function, in one line."""

import os
import re
import sys
import types
from collections.abc import Iterable
from typing import Any

_LIBRARY = re.compile(r"/site-packages/|/dist-packages/|/lib/python3[^/]*/|^<frozen ")


def describe(error: SystemExit, frames: Iterable[types.TracebackType]) -> str:
    """Its code, the line of the user's that led to it, and what argparse found wrong."""
    frames = list(frames)
    said = f"called sys.exit({error.code!r})"
    own = [frame for frame in frames if not _LIBRARY.search(frame.tb_frame.f_code.co_filename)]
    if own:
        code = own[-1].tb_frame.f_code
        said += f" in {code.co_name} ({os.path.basename(code.co_filename)}:{own[-1].tb_lineno})"
    usage_error = "".join(filter(None, map(_usage_error, frames)))
    return f"{said}: {usage_error}" if usage_error else said


def _usage_error(frame: types.TracebackType) -> str | None:
    """The message of `ArgumentParser.error`, which is not in the exception that it raises."""
    argparse: Any = sys.modules.get("argparse")
    code = frame.tb_frame.f_code
    if argparse is None or code is not getattr(argparse.ArgumentParser.error, "__code__", None):
        return None
    named: dict[str, Any] = frame.tb_frame.f_locals
    return f"{named['self'].prog}: error: {named['message']}"
