"""The README's first example and its table of options are true."""

import dataclasses
import re
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.scripts import run_alone

pytestmark = pytest.mark.usefixtures("joined")

README = (Path(__file__).parents[1] / "README.md").read_text()


def code_block(containing: str) -> str:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if containing in b]
    return block


def test_every_block_of_python_is_run_here() -> None:
    run_here = [
        code_block(part)
        for part in ("def total", "result.rank(0)", "launcher.session()", "DataError")
    ]

    assert sorted(re.findall(r"```python\n(.*?)```", README, re.S)) == sorted(run_here)


def test_first_example_and_what_follows_it(tmp_path: Path) -> None:
    values = code_block("result.rank(0)").replace('"node1"', "result.hostnames[0]")
    more = code_block("launcher.session()")
    script = (
        code_block("def total") + "    " + "    ".join((more + values).splitlines(keepends=True))
    )
    done = run_alone(script, tmp_path)

    assert done.stdout == "[3, 3]\n", done.stderr


def test_failing_example_says_what_the_readme_says(tmp_path: Path) -> None:
    done = run_alone(code_block("DataError"), tmp_path)

    assert done.returncode == 1
    assert "torchrunx_ray.errors.RemoteFailure: on rank 2 (" in done.stderr
    assert "\nDataError: shard 17 is truncated\nRaised by rank 2 (local rank 2 on" in done.stderr


def test_table_has_every_option_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", README, re.M))
    fields = {field.name: field for field in dataclasses.fields(trx.Launcher)}

    assert rows.keys() == fields.keys()
    for name, shown in rows.items():
        default = fields[name].default
        if name == "name":
            assert default is None
        elif name == "default_env_vars":
            assert shown == ", ".join(trx.Launcher().default_env_vars)
        else:
            assert shown.strip("`").replace('"', "'") == repr(default)
