"""The meaning of a command line: a script, the options of its launch, and places for its output."""

import os
import re
import signal
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrunx_ray.cli import grammar, slurm
from torchrunx_ray.cli.console import with_names_of_options
from torchrunx_ray.cli.grammar import UsageError
from torchrunx_ray.driver.launcher import Launcher
from torchrunx_ray.driver.terminal.console import TextStream
from torchrunx_ray.worker.function.script import Script, ScriptKind

_FLAGS: Mapping[TextStream, int] = {"stdout": 1, "stderr": 2}

_SHUTDOWN_S = 30.0

_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that Ray sets for the driver of a job."""


@dataclass(frozen=True)
class StreamsOfRanks:
    """A value of -r or -t: streams of all workers, or of some local ranks."""

    of_all: int = 0
    of_some: Mapping[int, int] | None = None

    @classmethod
    def parsed(cls, option: str, text: str) -> "StreamsOfRanks":
        if re.fullmatch("[0-3]", text):
            return cls(int(text))
        if re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
            pairs = (each.split(":") for each in text.split(","))
            return cls(of_some={int(local_rank): int(flags) for local_rank, flags in pairs})
        raise UsageError(
            f"{option}={text}: expected 0 (nothing), 1 (stdout), 2 (stderr) or 3 (both), or such a number for some "
            "local ranks: 0:3,1:2"
        )

    def have(self, stream: TextStream, local_rank: int) -> bool:
        flags = self.of_all if self.of_some is None else self.of_some.get(local_rank, 0)
        return bool(flags & _FLAGS[stream])

    @property
    def is_empty(self) -> bool:
        return not self.of_all and not any((self.of_some or {}).values())


@dataclass(frozen=True)
class OutputWanted:
    """Places for the workers' output."""

    directory: str | None
    redirected: StreamsOfRanks
    teed: StreamsOfRanks
    shown_local_ranks: frozenset[int] | None
    """Local ranks that the console shows; None for all."""
    filters: Mapping[TextStream, Sequence[str]]
    prefix: str | None
    """Template of the prefix of teed lines; None for torchrun's."""


@dataclass(frozen=True)
class Wanted:
    """All that a command line asks for."""

    launcher: Launcher
    script: Script
    output: OutputWanted
    role: str
    run_id: str | None
    """The user's name for the run; None if there is none."""
    has_virtual_local_ranks: bool
    numa_binding: str | None
    signals: Sequence[signal.Signals]
    """Signals that are passed on to the workers, and end the run."""
    address: str | None
    """Address of the cluster; None if Ray finds it."""
    working_dir: str | None
    unneeded: Sequence[str]
    """Options that were given although Ray does their work."""


def wanted(arguments: Sequence[str]) -> Wanted:
    """Return what a command line asks for. Raises UsageError, or exits after `--help`."""
    options = grammar.parse(arguments)
    given = grammar.given(arguments)
    _refuse(options)
    slurm.check_is_started_once()
    run_id = options.rdzv_id if "rdzv_id" in given else None
    return Wanted(
        launcher=_launcher(options, given, run_id),
        script=_script(options),
        output=_output(options),
        role=options.role,
        run_id=run_id,
        has_virtual_local_ranks=options.virtual_local_rank,
        numa_binding=options.numa_binding,
        signals=_signals(options.signals_to_handle),
        address=_address(options),
        working_dir=options.working_dir,
        unneeded=[f"--{name.replace('_', '-')}" for name in _UNNEEDED if name in given],
    )


_UNNEEDED = ("rdzv_backend", "rdzv_endpoint", "master_addr", "master_port", "local_addr")


def _refuse(options: Namespace) -> None:
    """Refuse what has no meaning here."""
    if options.module and options.no_python:
        raise UsageError(
            "Don't use both the '--no-python' flag and the '--module' flag at the same time."
        )
    if options.node_rank:
        raise UsageError(
            f"--node-rank={options.node_rank}: type the command once, on one machine. It starts the workers of all "
            "hosts, and Ray orders the hosts."
        )
    if options.logs_specs is not None:
        raise UsageError(
            f"--logs-specs={options.logs_specs}: a LogsSpecs runs beside the elastic agent, which this command does "
            "not have. Use torchrunx_ray.elastic.RayElasticAgent, which takes one, or -r, -t and --log-dir."
        )
    if options.event_log_handler != "null":
        raise UsageError(
            f"--event-log-handler={options.event_log_handler}: this command records no events of torch. Use "
            "torchrunx_ray.elastic.RayElasticAgent, which does."
        )
    if options.working_dir is not None and _IN_JOB in os.environ:
        raise UsageError(
            f"--working-dir={options.working_dir}: in a Ray job, the folder is sent by `ray job submit --working-dir`"
        )
    if options.standalone and options.address is not None:
        raise UsageError(
            f"--standalone starts a Ray of its own, and --address={options.address} names another one"
        )


def _launcher(options: Namespace, given: frozenset[str], run_id: str | None) -> Launcher:
    values: dict[str, Any] = {
        "hostnames": _hosts(options, given),
        "workers_per_host": _workers(options.nproc_per_node),
        "gpus_per_worker": options.gpus_per_worker,
        "spares": options.spares,
        "max_restarts": options.max_restarts,
        "shutdown_timeout": _shutdown_timeout(options.shutdown_timeout),
        "extra_env_vars": ("*", *options.env),
        "env_file": options.env_file,
        "name": run_id or os.path.basename(options.training_script),
    }
    if options.preload is not None:
        values["preload"] = options.preload
    if "start_method" in given and options.start_method == "spawn":
        values["start_method"] = "spawn"
    if (placement_timeout := _join_timeout(options.rdzv_conf)) is not None:
        values["placement_timeout"] = placement_timeout
    try:
        # No CPUs are reserved, as under torchrun, so as many workers as wanted fit on a host.
        return Launcher(**values, cpus_per_worker=0, backend=None, log_handlers=None)
    except (ValueError, TypeError) as error:
        raise UsageError(with_names_of_options(str(error))) from None


def _hosts(options: Namespace, given: frozenset[str]) -> Any:
    if options.hostnames is not None:
        if "nnodes" in given:
            raise UsageError(
                "--hostnames names the hosts, and --nnodes counts them: give one of the two"
            )
        return options.hostnames
    text: str = options.nnodes
    if options.standalone and text == "1:1":
        return ["localhost"]
    if text == "all":
        return "auto"
    if not re.fullmatch(r"\d+(:\d+)?", text):
        raise UsageError(f"--nnodes={text}: expected a number of hosts, MIN:MAX, or all")
    least, _, most = text.partition(":")
    smallest, largest = int(least), int(most or least)
    if not 0 < smallest <= largest:
        raise UsageError(
            f"--nnodes={text}: expected at least one host, and no more for MIN than for MAX"
        )
    return smallest if smallest == largest else (smallest, largest)


def _workers(text: str) -> Any:
    if text in ("gpu", "cpu", "auto"):
        return text
    if text == "xpu":
        raise UsageError("--nproc-per-node=xpu: Ray does not count a host's XPUs; give a number")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--nproc-per-node={text}: expected a number of workers, gpu, cpu or auto")
    return int(text)


def _shutdown_timeout(given: int | None) -> float:
    if given is not None:
        return given
    text = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    try:
        return float(text) if text else _SHUTDOWN_S
    except ValueError:
        raise UsageError(
            f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={text}: expected a number of seconds"
        ) from None


def _join_timeout(conf: str) -> float | None:
    """Return the time to wait for hosts from `--rdzv-conf`, whose other settings are for other rendezvous."""
    settings: dict[str, str] = {}
    for each in filter(None, map(str.strip, conf.split(","))):
        name, equals, value = each.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise UsageError(f"--rdzv-conf={conf}: expected NAME=VALUE, and commas between several")
        settings[name.strip()] = value.strip()
    text = settings.get("join_timeout", settings.get("timeout"))
    try:
        return None if text is None else float(text)
    except ValueError:
        raise UsageError(f"--rdzv-conf={conf}: join_timeout is no number of seconds") from None


def _script(options: Namespace) -> Script:
    kind: ScriptKind = "file"
    if options.run_path:
        kind = "run path"
    elif options.module:
        kind = "module"
    elif options.no_python:
        kind = "program"
    return Script(
        kind,
        options.training_script,
        tuple(options.training_script_args),
        os.environ.get("PYTHON_EXEC", ""),
    )


def _output(options: Namespace) -> OutputWanted:
    shown: frozenset[int] | None = None
    if options.local_ranks_filter:
        try:
            shown = frozenset(map(int, options.local_ranks_filter.split(",")))
        except ValueError:
            raise UsageError(
                f"--local-ranks-filter={options.local_ranks_filter}: expected local ranks with commas between them"
            ) from None
    return OutputWanted(
        directory=options.log_dir,
        redirected=StreamsOfRanks.parsed("--redirects", options.redirects),
        teed=StreamsOfRanks.parsed("--tee", options.tee),
        shown_local_ranks=shown,
        filters={
            "stdout": options.duplicate_stdout_filters,
            "stderr": options.duplicate_stderr_filters,
        },
        prefix=os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
    )


def _signals(text: str) -> list[signal.Signals]:
    found: list[signal.Signals] = []
    for name in filter(None, map(str.strip, text.split(","))):
        try:
            found.append(signal.Signals[name])
        except KeyError:
            raise UsageError(f"--signals-to-handle={text}: {name} is no signal's name") from None
        if found[-1] in (signal.SIGKILL, signal.SIGSTOP):
            raise UsageError(f"--signals-to-handle={text}: no process can handle {name}")
    return found


def _address(options: Namespace) -> str | None:
    return "local" if options.standalone else options.address
