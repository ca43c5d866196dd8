"""The README's examples, and the table of options in docs/, are true."""

import dataclasses
import re
import socket
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


def test_failing_example_says_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path / "torchrunx_logs"))
    done = run_alone(code_block("DataError"), tmp_path)

    (shown,) = re.findall(r"```\n(torchrunx_ray.errors.RemoteFailure.*?)```", README, re.S)
    begin = done.stderr.index("torchrunx_ray.errors.RemoteFailure")
    assert done.returncode == 1
    assert without_what_varies(done.stderr[begin:]) == without_what_varies(shown)


def without_what_varies(printed: str) -> list[str]:
    """Leave out where and when it ran, how Python marks the place, and what became of the other ranks.

    Those have failed in their collective, or still wait in it and are stopped: that is up to gloo.
    """
    text = printed.replace(socket.gethostname(), "vm").replace("script.py", "fail.py")
    text = re.sub(r"pid \d+", "pid N", text)
    text = re.sub(r"launch: /.*_train-\w+$", "launch: DIRECTORY", text, flags=re.M)
    text = re.sub(r'File ".*/', 'File ".../', text)
    text = re.sub(r"line \d+, in launch", "line N, in launch", text)
    for of_others in (
        r"\d\.\d+ s later, rank \d on vm.*?: RuntimeError: .*\n",
        r"What the others were doing:\n(  .*\n)+",
        r"Stopped by the launch after that: rank \d on vm.*\n",
    ):
        text = re.sub(rf"^{of_others}", "", text, flags=re.M)
    return [line for line in text.splitlines() if line.strip(" ~^") or not line]


def test_table_has_every_option_with_its_default() -> None:
    page = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", page, re.M))
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
