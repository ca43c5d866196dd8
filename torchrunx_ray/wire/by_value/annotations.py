"""Names used by annotations that are strings, as `from __future__ import annotations` makes them."""

import contextlib
import dis
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast


def code_of(function: types.FunctionType) -> list[types.CodeType]:
    """Return the compiled annotations of a function, and of the functions and classes inside it."""
    texts = [*_texts_of(function.__annotations__), *_texts_inside(function.__code__)]
    return list(_compiled(texts))


def names_in(codes: Iterable[types.CodeType]) -> Iterator[str]:
    """Yield the names that the code looks up, without attribute names."""
    for code in itertools.chain.from_iterable(map(with_inner, codes)):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                yield instruction.argval


def with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield this code, and the code of all functions and classes inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from with_inner(constant)


def carrier_of(kind: type) -> types.FunctionType | None:
    """Return a function that is pickled with the globals that a class's annotations use; None if they use none."""
    module = sys.modules.get(cast("Any", kind).__module__)
    annotations = vars(kind).get("__annotations__")
    if not isinstance(module, types.ModuleType) or not isinstance(annotations, dict):
        return None
    carrier = types.FunctionType(_carrying.__code__, vars(module))
    carrier.__annotations__ = cast("dict[str, Any]", annotations)
    return carrier if code_of(carrier) else None


def _carrying() -> None:
    """Do nothing."""


def _texts_of(annotations: Mapping[str, Any]) -> Iterator[str]:
    for annotation in annotations.values():
        yield from _texts_in(annotation)


def _texts_in(annotation: Any) -> Iterator[str]:
    """Yield the strings in an annotation, such as "Config" in Optional["Config"]."""
    if isinstance(annotation, str):
        yield annotation
    elif isinstance(annotation, typing.ForwardRef):
        yield annotation.__forward_arg__
    elif typing.get_origin(annotation) not in (None, typing.Literal):
        for each in getattr(annotation, "__args__", ()):
            yield from _texts_in(each)


def _texts_inside(code: types.CodeType) -> Iterator[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    if not inner and "__annotations__" not in code.co_names:
        return
    loaded: object = None
    for instruction in dis.get_instructions(code):
        if instruction.argval == "__annotations__" and isinstance(loaded, str):
            yield loaded  # an annotation in a class body
        if instruction.opname == "LOAD_CONST":
            if instruction.argval in inner:
                yield from _texts_of_parameters(instruction.argval, loaded)
            loaded = instruction.argval
        elif not instruction.opname.startswith(_LOADS_A_CLOSURE):
            loaded = None
    for each in inner:
        yield from _texts_inside(each)


_LOADS_A_CLOSURE = "LOAD_CLOSURE", "LOAD_FAST", "BUILD_TUPLE"
"""Instructions between a function's annotations and its code."""


def _texts_of_parameters(function: types.CodeType, constant: object) -> Iterator[str]:
    """Yield every second part of a constant such as ("config", "Config", "return", "int")."""
    if not isinstance(constant, tuple):
        return
    parts = cast("tuple[object, ...]", constant)
    arguments, *further = inspect.getargs(function)
    if len(parts) % 2 == 0 and {*arguments, *further, "return"}.issuperset(parts[::2]):
        yield from (text for text in parts[1::2] if isinstance(text, str))


def _compiled(texts: Iterable[str]) -> Iterator[types.CodeType]:
    for text in dict.fromkeys(texts):
        with contextlib.suppress(SyntaxError, ValueError):  # an annotation may be any string
            yield compile(f"[{text}]", "<annotation>", "eval", dont_inherit=True)
