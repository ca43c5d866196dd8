"""What is wrong with a function, or with the arguments that it is to be called with, before anything starts."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def check_function(func: object) -> None:
    if not callable(func):
        raise TypeError(
            f"func={func!r} is not callable; pass the function itself, not what it returns."
        )


def check_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """That the function takes them, as far as it can be told here."""
    try:
        name = getattr(func, "__name__", type(func).__name__)
        is_async = inspect.iscoroutinefunction(func)
        signature = None if _says_itself(func) else inspect.signature(func, follow_wrapped=False)
    except (
        Exception
    ):  # functions written in C have none; proxies, and annotations of 3.14, raise any
        return
    if is_async:
        raise TypeError(
            f"func={name} is an async function, which workers would not await; pass a function that calls "
            f"asyncio.run({name}(...))."
        )
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{name}{signature} cannot be called with the arguments that it was given: {error}. "
            "Options go into Launcher(...) or launch(...), not into run() and submit()."
        ) from None


def _says_itself(func: Any) -> bool:
    """Whether a decorator put a signature there, which need not be what the function takes."""
    asked: Any = func.func if type(func) is functools.partial else func
    callers = (type(asked).__call__, asked.__init__, asked.__new__)
    return any(hasattr(each, "__signature__") for each in (asked, *callers))
