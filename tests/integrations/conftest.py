"""Examples run as users run them, and what they do without a launch, to compare."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _output_of(command: list[str], cwd: Path, ray_address: str = "local") -> list[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "RAY_ADDRESS": ray_address, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,  # a first build of DeepSpeed's C++ takes its time
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def run_example(address: str, tmp_path: Path) -> Callable[[str], list[str]]:
    """Run an example on the shared cluster; returns the lines that it printed."""
    return lambda name: _output_of(
        [sys.executable, str(EXAMPLES / f"{name}.py")], tmp_path, address
    )


@pytest.fixture
def run_script(address: str, tmp_path: Path) -> Callable[[str], list[str]]:
    """The same with a script of a test's own."""

    def run(script: str) -> list[str]:
        (tmp_path / "script.py").write_text(script)
        return _output_of([sys.executable, "script.py"], tmp_path, address)

    return run


@pytest.fixture
def call_plainly(tmp_path: Path) -> Callable[..., Any]:
    """Call an example's function in one plain Python process, with neither ranks nor group."""

    def call(name: str, function: str, *args: object) -> Any:
        script = f"import json, {name}; print(json.dumps({name}.{function}(*{args!r})))"
        script = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); {script}"
        return json.loads(_output_of([sys.executable, "-c", script], tmp_path)[-1])

    return call


@pytest.fixture
def load_example() -> Callable[[str], ModuleType]:
    """An example's module, for its data and models."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
