"""torchrun's command line, and our options beside it.

The table is our own, because torch's parser costs the import of torch. It has every option of the torch versions that
we support. tests/test_grammar.py compares it with the parser of the installed torch.
"""

import argparse
import os
from argparse import REMAINDER, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

PROGRAM = "torchrunx-ray"

_VARIABLE = "PET_"
"""Beginning of the names of variables that give options, as with torchrun."""


class Setting(argparse.Action):
    """An option whose default may come from a variable: `PET_MAX_RESTARTS` for `--max-restarts`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        options["default"] = os.environ.get(_variable(dest), options.get("default"))
        super().__init__(option_strings, dest, **options)

    def __call__(
        self,
        parser: ArgumentParser,  # noqa: ARG002  # argparse's interface
        namespace: Namespace,
        values: Any,
        option_string: Any = None,  # noqa: ARG002
    ) -> None:
        setattr(namespace, self.dest, values)


class Switch(argparse.Action):
    """An option without a value. A variable that is not 0 turns it on: `PET_STANDALONE=1` for `--standalone`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        text = os.environ.get(_variable(dest), "0")
        try:
            is_on = bool(int(text))
        except ValueError:
            raise UsageError(f"{_variable(dest)}={text}: expected 0 or 1") from None
        super().__init__(option_strings, dest, const=True, default=is_on, nargs=0, **options)

    def __call__(
        self,
        parser: ArgumentParser,  # noqa: ARG002
        namespace: Namespace,
        values: Any,  # noqa: ARG002
        option_string: Any = None,  # noqa: ARG002
    ) -> None:
        setattr(namespace, self.dest, True)


class UsageError(Exception):
    """The command line is wrong. The text is for the user."""


class Parser(ArgumentParser):
    """Raises a UsageError where argparse would exit, and lets torchrun's options win if an abbreviation is ambiguous."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        found: list[Any] = super()._get_option_tuples(option_string)
        torchruns = [each for each in found if each[0].dest not in OURS]
        return torchruns or found


OURS = frozenset(
    {
        "address",
        "env",
        "env_file",
        "gpus_per_worker",
        "hostnames",
        "preload",
        "spares",
        "working_dir",
    }
)
"""Options that torchrun does not have."""


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the options, with torchrun's defaults. Raises UsageError, or exits after `--help`."""
    options, unknown = made_parser().parse_known_args(arguments)
    if unknown:
        raise UsageError(_why_unknown(unknown))
    return options


def given(arguments: Sequence[str]) -> frozenset[str]:
    """Return the options on the command line and in variables, also those with their default value."""
    parser = made_parser()
    for action in parser._actions:  # it has no public name
        action.default = argparse.SUPPRESS
    found = vars(parser.parse_known_args(arguments)[0]).keys()
    dests = {action.dest for action in parser._actions} - OURS
    return frozenset(found | {dest for dest in dests if _variable(dest) in os.environ})


def made_parser() -> Parser:
    """Return the parser, with the defaults that the environment gives now."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [options] script.py [arguments of the script]",
        description="Run a script on workers across the hosts of a Ray cluster, with torchrun's options. Type the "
        "command once, on one machine.",
        epilog="Each of torchrun's options can also come from a variable: PET_NPROC_PER_NODE=8 for --nproc-per-node 8.",
        formatter_class=_Help,
    )
    _add_sizes(parser)
    _add_kinds_of_script(parser)
    _add_ours(parser)
    _add_restarts(parser)
    _add_output(parser)
    _add_meeting(parser)
    parser.add_argument("training_script", type=str, help="the script, module or program")
    parser.add_argument("training_script_args", nargs=REMAINDER, help="arguments of the script")
    for action in parser._actions:  # it has no public name
        action.metavar = _METAVARS.get(action.dest, action.metavar)
    return parser


_METAVARS = {
    "nnodes": "N|MIN:MAX|all",
    "nproc_per_node": "N|gpu|cpu|auto",
    "start_method": "METHOD",
    "role": "NAME",
    "numa_binding": "MODE",
    "address": "ADDRESS",
    "max_restarts": "N",
    "monitor_interval": "SECONDS",
    "shutdown_timeout": "SECONDS",
    "signals_to_handle": "SIGNAL[,SIGNAL...]",
    "log_dir": "DIR",
    "redirects": "STREAMS",
    "tee": "STREAMS",
    "local_ranks_filter": "RANK[,RANK...]",
    "duplicate_stdout_filters": "TEXT[,TEXT...]",
    "duplicate_stderr_filters": "TEXT[,TEXT...]",
    "logs_specs": "NAME",
    "event_log_handler": "NAME",
    "rdzv_id": "NAME",
    "rdzv_conf": "NAME=VALUE[,...]",
    "node_rank": "0",
    "rdzv_backend": "NAME",
    "rdzv_endpoint": "HOST:PORT",
    "master_addr": "HOST",
    "master_port": "PORT",
    "local_addr": "HOST",
}
"""Syntax of the values, for the help."""


class _Help(argparse.HelpFormatter):
    """Shows each option once: the forms with underscores are the same."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [each for each in action.option_strings if "_" not in each]
        if not shown:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {action.metavar}"
        return f"{', '.join(shown)}{value}"


def _add_sizes(parser: Parser) -> None:
    group = parser.add_argument_group("hosts and workers")
    group.add_argument(
        "--nnodes",
        action=Setting,
        type=str,
        default="1:1",
        help="number of hosts; MIN:MAX if it may change during the run; or all: every node that can hold workers "
        "(default: 1)",
    )
    group.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        action=Setting,
        type=str,
        default="1",
        help="workers on each host: a number; gpu or cpu: one for each of the host's; auto: gpu if a host has GPUs, "
        "else cpu (default: 1)",
    )
    group.add_argument(
        "--standalone", action=Switch, help="start a Ray of its own on this machine, and run there"
    )


def _add_kinds_of_script(parser: Parser) -> None:
    group = parser.add_argument_group("script")
    group.add_argument(
        "-m", "--module", action=Switch, help="the script is a module, as with python -m"
    )
    group.add_argument(
        "--no-python",
        "--no_python",
        action=Switch,
        help="the script is a program, which runs in the worker's place",
    )
    group.add_argument(
        "--run-path",
        "--run_path",
        action=Switch,
        help="run the script with runpy.run_path in the worker",
    )
    group.add_argument(
        "--start-method",
        "--start_method",
        action=Setting,
        type=str,
        default="spawn",
        choices=["spawn", "fork", "forkserver"],
        help="spawn, if you give it: a fresh interpreter for each worker. Otherwise, also with fork or forkserver, workers "
        "are forked from a process that has imported torch",
    )
    group.add_argument(
        "--role",
        action=Setting,
        type=str,
        default="default",
        help="name of the workers' role: ROLE_NAME, and the prefix of their lines with -t (default: default)",
    )
    group.add_argument(
        "--virtual-local-rank",
        "--virtual_local_rank",
        action=Switch,
        help="each worker sees only its own GPU, and has LOCAL_RANK=0",
    )
    group.add_argument(
        "--numa-binding",
        "--numa_binding",
        type=str,
        choices=["node", "socket", "exclusive", "core-complex"],
        default=None,
        help="bind each worker to the CPUs near its GPU: node, socket, exclusive or core-complex",
    )


def _add_ours(parser: Parser) -> None:
    group = parser.add_argument_group("cluster and environment (beyond torchrun)")
    group.add_argument(
        "--address",
        help="the Ray cluster: HOST:PORT, ray://HOST:PORT, or local. Default: RAY_ADDRESS, else the cluster of this "
        "machine, else a new Ray on this machine",
    )
    group.add_argument(
        "--hostnames",
        type=lambda text: text.split(","),
        metavar="NAME[,NAME...]",
        help="run on these nodes: names, addresses or Ray's node ids, in the order of the ranks",
    )
    group.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="N",
        help="GPUs that each worker gets for itself (default: 1 if each host has enough, else 0)",
    )
    group.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable of the workers, also if it would not travel by itself. May be repeated",
    )
    group.add_argument(
        "--env-file", metavar="FILE", help="a file on each host that bash sources for the workers"
    )
    group.add_argument(
        "--working-dir",
        metavar="DIR",
        help="send this folder to the hosts, and run the script there",
    )
    group.add_argument(
        "--preload",
        type=lambda text: text.split(","),
        metavar="MODULE[,MODULE...]",
        help="modules that are imported once for each host before workers are forked "
        "(default: torch,torch.distributed)",
    )
    group.add_argument(
        "--spares",
        type=int,
        default=0,
        metavar="N",
        help="hosts that are kept warm, and replace hosts that are lost",
    )


def _add_restarts(parser: Parser) -> None:
    group = parser.add_argument_group("restarts and signals")
    group.add_argument(
        "--max-restarts",
        "--max_restarts",
        action=Setting,
        type=int,
        default=0,
        help="how often all workers are started again after a failure, counted once for the run (default: 0)",
    )
    group.add_argument(
        "--monitor-interval",
        "--monitor_interval",
        action=Setting,
        type=float,
        default=0.1,
        help="not needed: the end of a worker is an event",
    )
    group.add_argument(
        "--shutdown-timeout",
        "--shutdown_timeout",
        action=Setting,
        type=int,
        default=None,
        help="seconds from the signal that stops a worker to SIGKILL (default: 30, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT)",
    )
    group.add_argument(
        "--signals-to-handle",
        "--signals_to_handle",
        action=Setting,
        type=str,
        default="SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        help="signals to this command that are passed on to the workers and end the run "
        "(default: SIGTERM,SIGINT,SIGHUP,SIGQUIT)",
    )


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--log-dir",
        "--log_dir",
        action=Setting,
        type=str,
        default=None,
        help="folder of the files that -r and -t write (default: a new folder in the folder for temporary files)",
    )
    group.add_argument(
        "-r",
        "--redirects",
        action=Setting,
        type=str,
        default="0",
        help="write output to files only: 1 stdout, 2 stderr, 3 both; or by local rank: 0:1,1:2",
    )
    group.add_argument(
        "-t",
        "--tee",
        action=Setting,
        type=str,
        default="0",
        help="write output to files, and to the console with a prefix; values as for -r",
    )
    group.add_argument(
        "--local-ranks-filter",
        "--local_ranks_filter",
        action=Setting,
        type=str,
        default="",
        help="show only these local ranks on the console: 0,1",
    )
    for stream in ("stdout", "stderr"):
        group.add_argument(
            f"--duplicate-{stream}-filters",
            f"--duplicate_{stream}_filters",
            action=Setting,
            type=comma_separated_list,
            default=[],
            help=f"write lines of {stream} that contain one of these texts to a file of their own: apple,orange. Two "
            "commas stand for a comma. Needs -t",
        )
    group.add_argument(
        "--logs-specs",
        "--logs_specs",
        default=None,
        type=str,
        help="refused: use torchrunx_ray.elastic.RayElasticAgent, which takes a LogsSpecs",
    )
    group.add_argument(
        "--event-log-handler",
        "--event_log_handler",
        action=Setting,
        type=str,
        default="null",
        help="refused: use torchrunx_ray.elastic.RayElasticAgent, which records torch's events",
    )


def _add_meeting(parser: Parser) -> None:
    group = parser.add_argument_group(
        "rendezvous",
        "Ray finds the hosts. These options are accepted, so that a command for torchrun works.",
    )
    group.add_argument(
        "--rdzv-id",
        "--rdzv_id",
        action=Setting,
        type=str,
        default="none",
        help="name of the run, and TORCHELASTIC_RUN_ID",
    )
    group.add_argument(
        "--rdzv-conf",
        "--rdzv_conf",
        action=Setting,
        type=str,
        default="",
        help="join_timeout=SECONDS: time to wait for room in the cluster (default: 600). The rest is not needed",
    )
    group.add_argument(
        "--node-rank",
        "--node_rank",
        type=int,
        action=Setting,
        default=0,
        help="0: one command starts all hosts",
    )
    unneeded: dict[str, tuple[type, Any]] = {
        "rdzv-backend": (str, "static"),
        "rdzv-endpoint": (str, ""),
        "master-addr": (str, "127.0.0.1"),
        "master-port": (int, None),
        "local-addr": (str, None),
    }
    for name, (kind, default) in unneeded.items():
        group.add_argument(
            f"--{name}",
            f"--{name.replace('-', '_')}",
            action=Setting,
            type=kind,
            default=default,
            help="not needed",
        )


def comma_separated_list(value: str) -> list[str]:
    """Return the texts between single commas. Two commas stand for one in a text."""
    return [item.replace("\0", ",") for item in value.replace(",,", "\0").split(",")]


def _variable(dest: str) -> str:
    return f"{_VARIABLE}{dest.upper()}"


def _why_unknown(unknown: Sequence[str]) -> str:
    """Return why options are refused. The installed torch may be newer than the table, and know them."""
    from torch.distributed.run import get_args_parser
    from torch.version import __version__ as version

    torchruns = get_args_parser().parse_known_args([*unknown, "a script"])[1]
    if torchruns:
        return f"unrecognized arguments: {' '.join(torchruns)}"
    return f"torchrun of torch {version} has {' '.join(unknown)}, and {PROGRAM} does not"
