"""A script in the place of a function: it runs as the worker's `__main__`."""

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from torchrunx_ray.worker.function import numa, program

ScriptKind = Literal["file", "module", "run path", "program"]


@dataclass(frozen=True)
class Script:
    """A script, a module, or another program, with its arguments."""

    kind: ScriptKind
    name: str
    args: tuple[str, ...]
    interpreter: str = ""
    """Interpreter that takes the worker's place, with its path; "" if the worker itself runs the script."""


class NoSuchScript(Exception):
    """The host has no such script."""


def run(script: Script, numa_binding: str | None) -> None:
    """Run the script as `python -u` would, or become the program.

    If the script raises an exception, the traceback is written to stderr, as by `python`.
    """
    numa.bound(_run, numa.options(numa_binding))(script)


def _run(script: Script) -> None:
    if script.kind == "program":
        _become([script.name, *script.args])
    if script.kind != "module":
        _check(script.name)
    if script.interpreter and script.kind != "run path":
        flags = ["-u", "-m"] if script.kind == "module" else ["-u"]
        _become([script.interpreter, *flags, script.name, *script.args])
    _write_at_once()
    sys.argv[:] = [script.name, *script.args]
    try:
        _RUNNERS[script.kind](script.name)
    except SystemExit as error:
        if not (error.code is None or isinstance(error.code, int)):
            print(error.code, file=sys.stderr)  # noqa: T201  # as the interpreter does
        raise
    except BaseException as error:
        _drop_own_frames(error)
        sys.excepthook(type(error), error, error.__traceback__)
        raise


def _become(command: Sequence[str]) -> NoReturn:
    try:
        program.become(command)
    except FileNotFoundError as error:
        raise NoSuchScript(str(error)) from None


def _check(name: str) -> None:
    if not os.path.exists(name):
        raise NoSuchScript(
            f"there is no {os.path.abspath(name)} on this host. A script must be on every host that runs it, at the "
            "same path: put it on a file system that all hosts share, or send its folder with --working-dir."
        )
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "__main__.py")):
        raise NoSuchScript(f"{os.path.abspath(name)} is a folder without a __main__.py")


def _write_at_once() -> None:
    """Keep no output back, as `python -u`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(write_through=True)


def _run_file(path: str) -> None:
    if os.path.isdir(path):
        runpy.run_path(path, run_name="__main__")
        return
    path = os.path.abspath(path)  # as the interpreter does; sys.argv has it as it was given
    main = _new_main()
    vars(main).update(
        __file__=path,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
        __cached__=None,
    )
    _search_first(os.path.dirname(os.path.realpath(path)))
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, vars(main))


def _run_module(name: str) -> None:
    """Run a module as `python -m` does, for which runpy has the interpreter's own function."""
    _new_main()
    _search_first(os.getcwd())
    vars(runpy)["_run_module_as_main"](name)


def _run_path(path: str) -> None:
    """Run a script as torchrun's --run-path does: `__main__` stays the worker's own module until runpy replaces it."""
    runpy.run_path(path, run_name="__main__")


def _new_main() -> types.ModuleType:
    """Put a fresh `__main__` in the place of the worker's."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    return main


def _search_first(folder: str) -> None:
    # sys.flags.safe_path is this package's own, and says nothing of the user.
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, folder)


def _drop_own_frames(error: BaseException) -> None:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OWN_FILES:
        frames = frames.tb_next
    error.__traceback__ = frames


_OWN_FILES = (__file__, runpy.__file__, "<frozen runpy>")

_RUNNERS: dict[ScriptKind, Callable[[str], None]] = {
    "file": _run_file,
    "module": _run_module,
    "run path": _run_path,
}
