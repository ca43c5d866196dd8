"""Options from a command line: `tyro.cli(Launcher)`, and argparse."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from torchrunx_ray.driver.options.command_line import VALUES

SNAPSHOTS = Path(__file__).parent / "snapshots"

SCRIPTS = {
    "tyro": """
import torchrunx_ray as trx
from torchrunx_ray import Launcher
import tyro

launcher = tyro.cli(Launcher)
""",
    "argparse": """
import argparse
import torchrunx_ray as trx
from torchrunx_ray.integrations.cli import add_torchrunx_argument_group, launcher_from_args

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=10, help="how many")
add_torchrunx_argument_group(parser)
launcher = launcher_from_args(parser.parse_args())
""",
}

SHOW = """
print({k: v for k, v in vars(launcher).items() if v != getattr(trx.Launcher(), k)})
"""

COMMAND_LINES: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("--hostnames 2", {"hostnames": 2}),
    ("--hostnames 1:3 --resize-interval 5", {"hostnames": (1, 3), "resize_interval": 5.0}),
    ("--hostnames 2 --spares 1 --max-restarts 3", {"hostnames": 2, "max_restarts": 3, "spares": 1}),
    ("--hostnames a b", {"hostnames": ("a", "b")}),
    ("--hostnames node1", {"hostnames": ("node1",)}),
    ("--hostnames slurm", {"hostnames": "slurm"}),
    ("--workers-per-host gpu", {"workers_per_host": "gpu"}),
    ("--workers-per-host 4", {"workers_per_host": 4}),
    ("--hostnames 2 --workers-per-host 4 2", {"hostnames": 2, "workers_per_host": (4, 2)}),
    ("--gpus-per-worker 0.5 --backend gloo", {"gpus_per_worker": 0.5, "backend": "gloo"}),
    ("--backend None --placement-timeout None", {"backend": None, "placement_timeout": None}),
    ("--label-selector region us", {"label_selector": {"region": "us"}}),
    ("--resources-per-host disk 4", {"resources_per_host": {"disk": 4.0}}),
    ("--extra-env-vars A=-1 WANDB_*", {"extra_env_vars": ("A=-1", "WANDB_*")}),
    ("--env-file job.env --name me", {"env_file": "job.env", "name": "me"}),
    ("--console-ranks all", {"console_ranks": "all"}),
    ("--console-ranks 0 3", {"console_ranks": (0, 3)}),
    ("--log-handlers None --progress True", {"log_handlers": None, "progress": True}),
    ('--runtime-env {"pip":["x"]}', {"runtime_env": {"pip": ["x"]}}),
    ("--runtime-env None", {}),
    ("--extra-env-vars all", {"extra_env_vars": "all"}),
    ("--name=-x --extra-env-vars=-x", {"extra_env_vars": ("-x",), "name": "-x"}),
]


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", SCRIPTS)
def test_help_is_as_it_was_read_last(kind: str) -> None:
    """After a change that is meant: run this test with UPDATE_SNAPSHOTS=1, and read the file."""
    shown = run(SCRIPTS[kind], "--help")
    path = SNAPSHOTS / f"help_{kind}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(shown.stdout)

    assert shown.stdout == path.read_text(), shown.stderr


@pytest.mark.parametrize("kind", SCRIPTS)
def test_options_are_parsed(kind: str) -> None:
    """In one process: each start takes a second."""
    loop = "import sys\nfor line in sys.argv[1:]:\n    sys.argv[1:] = line.split()\n"
    imports, _, rest = SCRIPTS[kind].strip().partition("\n\n")
    body = "".join(f"    {line}\n" for line in (rest + SHOW).splitlines())
    done = run(f"{imports}\n{loop}{body}", *(line for line, _ in COMMAND_LINES))

    assert done.stdout.splitlines() == [repr(options) for _, options in COMMAND_LINES], done.stderr


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--hostnames 0", "a number of hosts of at least 1"),
        ("--hostnames 3:1", "with 1 <= smallest <= largest"),
        ("--hostnames 1:", "hostnames='1:': expected"),
        ("--max-restarts -1", "an integer of at least 0"),
        ("--spares 1.5", "spares='1.5': expected an integer of at least 0"),
        ("--timeout soon", "timeout='soon': expected seconds, more than 0."),
        ("--timeout 0", "timeout=0.0: expected seconds, more than 0."),
        (
            "--workers-per-host gpus",
            """workers_per_host='gpus': expected "auto", "gpu", "cpu", "slurm", a number of at least 1""",
        ),
        ("--workers-per-host gpu 2", """workers_per_host=['gpu', '2']: expected "auto", "gpu","""),
        ("--gpus-per-worker half", "gpus_per_worker='half': expected None, or a number of at"),
        ("--console-ranks first", """console_ranks='first': expected "all", or a list of ranks"""),
        ("--label-selector zone", "label_selector='zone': expected None, or a mapping from"),
        (
            "--resources-per-host disk x",
            "resources_per_host=['disk', 'x']: expected None, or a mapping from names of",
        ),
        ("--hosts 2", "--hosts"),
        ('--runtime-env ["x"]', """'["x"]': expected a JSON object, or None"""),
        ("--runtime-env {pip:x}", "'{pip:x}': expected a JSON object, or None: Expecting property"),
    ],
)
def test_wrong_arguments_end_the_script_with_what_is_wrong(
    kind: str, line: str, reason: str
) -> None:
    done = run(SCRIPTS[kind], *line.split())

    assert done.returncode == 2
    assert reason in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_defaults_of_a_launcher_are_shown_as_they_would_be_written() -> None:
    """Lists and handlers ended `--help` with a traceback."""
    default = "hostnames=['a', 'b'], workers_per_host=[1, 2], console_ranks=[0, 1], log_handlers=[]"
    script = f"import torchrunx_ray as trx, tyro; tyro.cli(trx.Launcher, default=trx.Launcher({default}))"
    shown = " ".join(run(script, "--help").stdout.replace("│", " ").split())

    for expected in ("(default: a b)", "(default: 1 2)", "(default: 0 1)", "(default: given)"):
        assert expected in shown


def test_default_env_file_may_be_a_path() -> None:
    """Tyro warned that a PosixPath matches no type of the option."""
    script = """
import pathlib, tyro, torchrunx_ray as trx
print(repr(tyro.cli(trx.Launcher, default=trx.Launcher(env_file=pathlib.Path("/x"))).env_file))
"""
    done = run(script)

    assert (done.stdout, done.stderr) == ("PosixPath('/x')\n", "")
    assert "(default: /x)" in run(script, "--help").stdout


def test_every_option_has_its_place_on_the_command_line() -> None:
    names = [name for options in VALUES.values() for name in options]

    assert sorted(names) == sorted(field.name for field in fields(trx.Launcher))


def test_parser_may_have_an_argument_of_the_same_name() -> None:
    script = SCRIPTS["argparse"].replace("--steps", "--name").replace("type=int, ", "")
    refused = run(script)
    done = run(script.replace("group(parser)", 'group(parser, leave_out=["name"])') + SHOW)

    assert "conflicting option string: --name" in refused.stderr
    assert done.stdout == "{}\n", done.stderr


def test_what_cannot_be_left_out_is_named() -> None:
    done = run(SCRIPTS["argparse"].replace("(parser)", '(parser, leave_out=["nodes"])'))

    assert "leave_out=['nodes']: Launcher has no such option." in done.stderr


@pytest.mark.slow
def test_a_launch_does_not_load_tyro() -> None:
    script = """
import sys, ray, torchrunx_ray as trx
ray.init(address="local", num_cpus=1, include_dashboard=False)
there = trx.launch(lambda: "tyro" in sys.modules, workers_per_host=1, backend=None).rank(0)
print(there, "tyro" in sys.modules)
"""

    assert run(script).stdout == "False False\n"
