"""How options are written on a command line.

The annotations of options refer to `written_as`, for tyro; they are text until somebody asks for
them, so that no launch waits for the import of tyro.
"""

import ast
import json
from typing import Any, cast

VALUES = {
    "hosts and workers": {
        "hostnames": "auto|slurm|N|NAME...",
        "workers_per_host": "auto|gpu|cpu|slurm|N...",
        "gpus_per_worker": "N",
        "cpus_per_worker": "N",
        "accelerator_type": "NAME",
        "label_selector": "LABEL VALUE...",
        "resources_per_host": "NAME AMOUNT...",
        "placement_strategy": "STRATEGY",
    },
    "process group and times": {
        "backend": "NAME",
        "timeout": "SECONDS",
        "placement_timeout": "SECONDS",
        "shutdown_timeout": "SECONDS",
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
"""Every option by topic, with what its values look like; those that end in ... are lists."""

_METAVARS = {name: value for options in VALUES.values() for name, value in options.items()}


def written_as(option: str, kind: Any) -> Any:
    """Parse it as this type, which may be simpler than the option's own."""
    import tyro

    metavar = _METAVARS[option]
    return tyro.conf.arg(constructor=kind, metavar=metavar, help_behavior_hint=_default_hint)


def written_as_json() -> Any:
    """Parse it as a JSON object, or None."""
    from tyro.constructors import PrimitiveConstructorSpec

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_object_or_none,
        is_instance=lambda value: value is None or isinstance(value, dict),
        str_from_instance=lambda value: ["None" if value is None else json.dumps(value)],
    )


def written_as_auto_or_none() -> Any:
    """Parsed as one of these words; a default may be what only Python can give."""
    from tyro.constructors import PrimitiveConstructorSpec

    def parse(texts: list[str]) -> str | None:
        if texts[0] not in ("auto", "None"):
            raise ValueError(f"{texts[0]!r}: expected auto or None")
        return None if texts[0] == "None" else "auto"

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="auto|None",
        instance_from_str=parse,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value) if value in ("auto", None) else "given"],
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
        raise ValueError(expected)  # tyro lets a TypeError of Launcher's own through
    return cast("dict[str, Any]", parsed)


def _default_hint(shown: str) -> str:
    """Tyro shows a default that was parsed as another type as a list of words."""
    try:
        return f"(default: {' '.join(ast.literal_eval(shown)) or 'none'})"
    except (ValueError, SyntaxError):
        return f"(default: {shown})"
