"""A launcher's options for an argparse command line. With tyro, `tyro.cli(Launcher)` is enough."""

import argparse
import ast
import inspect
import itertools
from collections.abc import Iterable
from dataclasses import fields
from typing import cast

from torchrunx_ray.driver.launcher import Launcher
from torchrunx_ray.driver.options.command_line import VALUES
from torchrunx_ray.driver.options.options import Options

_PREFIX = "torchrunx_"
"""Prefix of our attributes of parsed arguments, since a parser's own --name has the attribute `name`."""


def add_torchrunx_argument_group(
    parser: argparse.ArgumentParser, *, leave_out: Iterable[str] = ()
) -> None:
    """Add arguments for the options of `Launcher`, in groups by topic.

    `leave_out` names options that get no argument, such as "name" if the parser has its own --name.
    """
    left_out = set(leave_out)
    defaults = {field.name: field.default for field in fields(Options)}
    if unknown := left_out - defaults.keys():
        raise ValueError(f"leave_out={sorted(unknown)}: Launcher has no such option.")
    texts = _docstrings()
    for topic, values in VALUES.items():
        group = parser.add_argument_group(f"launch: {topic}")
        for name, metavar in values.items():
            if name not in left_out:
                group.add_argument(
                    _flag(name),
                    dest=_PREFIX + name,
                    nargs="*" if metavar.endswith("...") else 1,
                    metavar=metavar.removesuffix("..."),
                    help=f"{texts[name]} (default: {_shown(defaults[name])})".replace("%", "%%"),
                )


def launcher_from_args(args: argparse.Namespace) -> Launcher:
    """Return a launcher with the parsed options. An invalid value ends the script, as any wrong argument does."""
    import tyro

    words: list[str] = []
    for field in fields(Options):
        given = getattr(args, _PREFIX + field.name, None)
        if given is not None:
            words += _written(_flag(field.name), given)
    return tyro.cli(Launcher, args=words)


def _written(flag: str, values: list[str]) -> list[str]:
    # Joined to the flag, a value may begin with a dash.
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _shown(default: object) -> str:
    if not isinstance(default, tuple):
        return str(default)
    return " ".join(map(str, cast("tuple[object, ...]", default))) or "none"


def _docstrings() -> dict[str, str]:
    """Return the docstring of each option from the source, since dataclasses do not keep them."""
    (definition,) = ast.parse(inspect.getsource(Options)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        ast.unparse(option.target): ast.literal_eval(below.value)
        for option, below in itertools.pairwise(definition.body)
        if isinstance(option, ast.AnnAssign) and isinstance(below, ast.Expr)
    }
