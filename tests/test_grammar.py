"""The command line of torchrunx-ray, compared with torchrun's of the installed torch."""

import argparse
from typing import Any

import pytest
from torch.distributed.argparse_util import check_env, env
from torch.distributed.run import get_args_parser

from torchrunx_ray.cli import grammar
from torchrunx_ray.cli.grammar import UsageError

KINDS = {
    env: "setting",
    check_env: "switch",
    grammar.Setting: "setting",
    grammar.Switch: "switch",
    argparse._StoreAction: "plain",
    argparse._HelpAction: "help",
}


def described(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return what the parser makes of each option."""
    return {
        action.dest: {
            "strings": list(action.option_strings),
            "kind": KINDS[type(action)],
            "type": getattr(action.type, "__name__", None),
            "nargs": action.nargs,
            "choices": action.choices,
            "default": action.default,
        }
        for action in parser._actions
        if action.dest not in grammar.OURS
    }


def test_each_option_of_torchrun_is_the_same_here() -> None:
    torchruns, ours = described(get_args_parser()), described(grammar.made_parser())

    assert {dest: ours.get(dest) for dest in torchruns} == torchruns


def test_options_beyond_torchrun_do_not_change_what_its_abbreviations_mean(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = grammar.parse(["--stand", "--ro", "trainer", "train.py"])
    with pytest.raises(SystemExit) as ended:
        grammar.parse(["--h"])  # and not --hostnames

    assert (options.standalone, options.role) == (True, "trainer")
    assert ended.value.code == 0
    assert "--nproc-per-node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "dest", "expected"),
    [
        ("NPROC_PER_NODE", "8", "nproc_per_node", "8"),
        ("MAX_RESTARTS", "3", "max_restarts", 3),
        ("STANDALONE", "1", "standalone", True),
        ("STANDALONE", "0", "standalone", False),
        ("DUPLICATE_STDOUT_FILTERS", "a,,b,c", "duplicate_stdout_filters", ["a,b", "c"]),
    ],
)
def test_options_come_from_variables(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, dest: str, expected: object
) -> None:
    monkeypatch.setenv(f"PET_{name}", value)

    assert getattr(grammar.parse(["train.py"]), dest) == expected
    assert getattr(get_args_parser().parse_args(["train.py"]), dest) == expected
    assert dest in grammar.given(["train.py"])


def test_arguments_of_the_script_are_left_alone() -> None:
    words = ["--nnodes=2", "train.py", "--nnodes", "5", "--address", "x", "--", "-m"]
    options, torchruns = grammar.parse(words), get_args_parser().parse_args(words)

    assert options.training_script_args == torchruns.training_script_args
    assert (options.nnodes, options.address) == ("2", None)


def test_explicit_default_counts_as_given() -> None:
    assert grammar.given(["--start-method", "spawn", "train.py"]) >= {"start_method"}
    assert "start_method" not in grammar.given(["train.py"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: training_script, training_script_args"),
        (["--unknown", "train.py"], "unrecognized arguments: --unknown"),
        (
            ["--max-restarts", "many", "train.py"],
            "argument --max-restarts/--max_restarts: invalid int",
        ),
        (["--start-method", "thread", "train.py"], "invalid choice: 'thread'"),
    ],
)
def test_wrong_usage_is_told_in_the_words_of_torchrun(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as ours:
        grammar.parse(words)
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(words)

    assert said in str(ours.value)
    assert said in capsys.readouterr().err
