"""Syntax of the options on a command line.

The annotations of options call `written_as`, for tyro. Annotations are strings until they are
evaluated, so that no launch waits for the import of tyro.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

from torchrunx_ray.driver.options.checks import EXPECTED

VALUES = {
    "hosts and workers": {
        "hostnames": "auto|slurm|N|MIN:MAX|NAME...",
        "workers_per_host": "auto|gpu|cpu|slurm|N...",
        "gpus_per_worker": "N",
        "cpus_per_worker": "N",
        "accelerator_type": "NAME",
        "label_selector": "LABEL VALUE...",
        "resources_per_host": "NAME AMOUNT...",
        "placement_strategy": "STRATEGY",
        "spares": "INT",
    },
    "process group and times": {
        "backend": "NAME",
        "timeout": "SECONDS",
        "placement_timeout": "SECONDS",
        "shutdown_timeout": "SECONDS",
        "max_restarts": "INT",
        "restart_if": "None",
        "resize_interval": "SECONDS",
        "host_timeout": "SECONDS",
        "health_check_port": "PORT",
        "linger": "SECONDS",
    },
    "environment": {
        "default_env_vars": "PATTERN...",
        "extra_env_vars": "all|PATTERN|NAME=VALUE...",
        "env_file": "FILE",
        "preload": "MODULE...",
        "start_method": "fork|spawn",
        "runtime_env": "JSON",
    },
    "output": {
        "log_handlers": "auto|None",
        "console_ranks": "all|RANK...",
        "progress": "True|False|None",
        "name": "NAME",
    },
}
"""Every option by topic, with the syntax of its values. Values that end in ... are lists."""

_METAVARS = {name: value for options in VALUES.values() for name, value in options.items()}


def written_as(option: str, parse: Callable[[list[str]], Any]) -> Any:
    """Return an annotation that parses an option's words by `parse`.

    An invalid value gives the same message as in Python.
    """
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec

    def checked(texts: list[str]) -> Any:
        try:
            return parse(texts)
        except ValueError:
            value = texts[0] if len(texts) == 1 else texts
            raise ValueError(f"{option}={value!r}: expected {EXPECTED[option]}.") from None

    metavar = _METAVARS[option]
    spec = PrimitiveConstructorSpec(
        nargs="*" if metavar.endswith("...") else 1,
        metavar=metavar,
        instance_from_str=checked,
        is_instance=lambda _: True,
        str_from_instance=_assignments if option == "extra_env_vars" else _written,
    )
    kind: Any = Annotated[Any, spec]  # tyro accepts this, although its annotations do not say so
    return tyro.conf.arg(constructor=kind, help_behavior_hint=_default_hint)


def hosts(texts: list[str]) -> int | str | tuple[int, ...] | tuple[str, ...]:
    """Return a number of hosts, a smallest and a largest number, "auto", "slurm", or names."""
    if len(texts) == 1 and texts[0] in ("auto", "slurm"):
        return texts[0]
    if len(texts) == 1 and re.fullmatch(r"\d+:\d*", texts[0]):
        return integers(texts[0].split(":"))
    return int(texts[0]) if len(texts) == 1 and texts[0].isdecimal() else tuple(texts)


def workers(texts: list[str]) -> int | str | tuple[int, ...]:
    """Return a number of workers, several numbers, or the word that decides the number."""
    if len(texts) == 1:
        word = texts[0]
        return word if word in ("auto", "gpu", "cpu", "slurm") else int(word)
    return integers(texts)


def ranks(texts: list[str]) -> str | tuple[int, ...]:
    """Return "all", or ranks."""
    return "all" if texts == ["all"] else integers(texts)


def integers(texts: list[str]) -> tuple[int, ...]:
    """Return the words as numbers."""
    return tuple(map(int, texts))


def integer(texts: list[str]) -> int:
    """Return the only word as an integer."""
    return int(texts[0])


def integer_or_none(texts: list[str]) -> int | None:
    """Return the only word as an integer, or None."""
    return None if texts == ["None"] else integer(texts)


def variables(texts: list[str]) -> str | tuple[str, ...]:
    """Return "all", or patterns and assignments."""
    return "all" if texts == ["all"] else tuple(texts)


def number(texts: list[str]) -> float:
    """Return the only word as a number."""
    return float(texts[0])


def number_or_none(texts: list[str]) -> float | None:
    """Return the only word as a number, or None."""
    return None if texts == ["None"] else number(texts)


def string_or_none(texts: list[str]) -> str | None:
    """Return the only word, or None."""
    return None if texts == ["None"] else texts[0]


def pairs(texts: list[str]) -> dict[str, str] | None:
    """Return a mapping from alternating names and values, or None."""
    if texts == ["None"]:
        return None
    return dict(zip(texts[::2], texts[1::2], strict=True))


def amounts(texts: list[str]) -> dict[str, float] | None:
    """Return a mapping from alternating names and numbers, or None."""
    named = pairs(texts)
    return None if named is None else {name: float(amount) for name, amount in named.items()}


def written_as_json() -> Any:
    """Return an annotation that parses a word as a JSON object, or None."""
    from tyro.constructors import PrimitiveConstructorSpec

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_object_or_none,
        is_instance=lambda value: value is None or isinstance(value, dict),
        str_from_instance=lambda value: ["None" if value is None else json.dumps(value)],
    )


def written_as_words(*words: str) -> Any:
    """Return an annotation that parses one of these words; "None" is None.

    A default may be a value that only Python can give.
    """
    from tyro.constructors import PrimitiveConstructorSpec

    def parse(texts: list[str]) -> str | None:
        if texts[0] not in words:
            raise ValueError(f"{texts[0]!r}: expected {' or '.join(words)}")
        return None if texts[0] == "None" else texts[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(words),
        instance_from_str=parse,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value) if str(value) in words else "given"],
    )


def _object_or_none(texts: list[str]) -> dict[str, Any] | None:
    (text,) = texts
    if text == "None":
        return None
    expected = f"{text!r}: expected a JSON object, or None"
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(expected)  # tyro would not catch Launcher's TypeError
    return cast("dict[str, Any]", parsed)


def _assignments(value: Any) -> list[str]:
    """Return patterns, or a mapping of variables, as words of a command line."""
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return [f"{name}={text}" for name, text in items]
    return _written(value)


def _default_hint(shown: str) -> str:
    """Return a default as words of a command line, since tyro shows a Python list."""
    try:
        return f"(default: {' '.join(ast.literal_eval(shown)) or 'none'})"
    except (ValueError, SyntaxError):
        return f"(default: {shown})"


def _written(value: Any) -> list[str]:
    """Return a value as words of a command line."""
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return [str(part) for item in items for part in item]
    if isinstance(value, list | tuple):
        return [str(part) for part in cast("Sequence[object]", value)]
    return [str(value)]
