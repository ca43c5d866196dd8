"""Checks of a function and its arguments, before anything starts."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrunx_ray.driver.options.options import Options

_NOT_RUN: Sequence[tuple[Callable[[Any], bool], str, str]] = (
    (
        inspect.iscoroutinefunction,
        "an async function, which workers would not await",
        "asyncio.run({name}(...))",
    ),
    (
        inspect.isgeneratorfunction,
        "a generator function, whose lines would not run",
        "list({name}(...)), or that returns what it yields",
    ),
    (
        inspect.isasyncgenfunction,
        "an async generator function, whose lines would not run",
        "asyncio.run() with a function that loops over {name}(...)",
    ),
)
"""Functions whose call only makes an object. Each entry has a test, a description, and a replacement."""


def check_function(func: object) -> None:
    if not callable(func):
        raise TypeError(
            f"func={func!r} is not callable; pass the function itself, not what it returns."
        )


def check_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError if the function's signature does not accept the arguments."""
    try:
        name = _name(func)
        not_run = _why_not_run(func, name)
        signature = None if _says_itself(func) else inspect.signature(func, follow_wrapped=False)
    except Exception:
        # Functions in C have no signature. Proxies, and annotations of Python 3.14, may raise any exception.
        return
    if not_run is not None:
        raise TypeError(not_run)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(_why_not_called(name, signature, kwargs, error)) from None


def _name(func: Any) -> str:
    asked: Any = func.func if type(func) is functools.partial else func
    return getattr(asked, "__name__", type(asked).__name__)


def _why_not_run(func: Any, name: str) -> str | None:
    for tells, what, instead in _NOT_RUN:
        if tells(func) or tells(type(func).__call__):
            return f"func={name} is {what}; pass a function that calls {instead.format(name=name)}."
    return None


def _why_not_called(
    name: str, signature: inspect.Signature, kwargs: Mapping[str, Any], error: TypeError
) -> str:
    unknown = [each for each in kwargs if each not in signature.parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    options = {field.name for field in dataclasses.fields(Options)}
    if not unknown or takes_any:
        return f"{name}{signature} cannot be called with the arguments that it was given: {error}."
    takes = signature.replace(return_annotation=signature.empty)
    said = f"{name} has no parameter {unknown[0]!r}; it takes {takes}."
    if unknown[0] in options:
        return f"{said} Options go into Launcher(...) or launch(...), not into run() and submit()."
    nearest = difflib.get_close_matches(unknown[0], list(signature.parameters), n=1)
    return f"{said} Did you mean {nearest[0]!r}?" if nearest else said


def _says_itself(func: Any) -> bool:
    """Return True if a decorator set `__signature__`, which may differ from the real parameters."""
    asked: Any = func.func if type(func) is functools.partial else func
    callers = (type(asked).__call__, asked.__init__, asked.__new__)
    return any(hasattr(each, "__signature__") for each in (asked, *callers))
