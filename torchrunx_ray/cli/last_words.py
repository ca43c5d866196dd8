"""The report of a failed script, as the last words of the command."""

import contextlib
import dataclasses
import sys
import textwrap
from datetime import datetime

from torchrunx_ray.driver.report.failures import Failure, Failures
from torchrunx_ray.errors import bytes_in_words, describe_exit
from torchrunx_ray.wire import messages
from torchrunx_ray.worker.function.script import NoSuchScript

_RULE = "=" * 60


def report(script: str, failures: Failures, folder: str | None) -> None:
    """Write the report: the first failure with its evidence, then the others, then where the output is."""
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(_text(script, failures, folder), file=sys.stderr)  # noqa: T201


def _text(script: str, failures: Failures, folder: str | None) -> str:
    first = failures.in_order()[0]
    lines = [_RULE, f"{script} FAILED", "", "Root cause (first failure):", *_facts(first)]
    lines += _evidence(first, failures)
    if notes := failures.notes:
        lines += ["", "Then:", *(textwrap.indent(note, "  ") for note in notes)]
    if folder is not None:
        lines += ["", f"Files of the workers' output: {folder}"]
    return "\n".join([*lines, _RULE])


def _facts(failure: Failure) -> list[str]:
    at = datetime.fromtimestamp(failure.time_ns / 1e9)
    facts = {"time": f"{at:%Y-%m-%d %H:%M:%S.%f}"[:-3], "host": failure.hostname}
    report = failure.report
    match report:
        case messages.Failed():
            facts["rank"] = f"{failure.rank} (local rank {report.local_rank})"
            code = 1 if report.exit_code is None else report.exit_code
            facts["exit code"] = f"{code} (pid {report.pid})"
        case messages.Died(exited=exited):
            facts["rank"] = f"{failure.rank} (local rank {exited.local_rank})"
            facts["end"] = f"{describe_exit(exited.exit_code, exited.signal)} (pid {exited.pid})"
            facts["memory"] = f"at most {bytes_in_words(exited.peak_memory)}"
        case messages.ScopeExpired():
            facts["rank"] = f"{failure.rank} (local rank {report.local_rank})"
            facts["end"] = f"the watchdog ended it (pid {report.pid})"
        case _:
            pass
    return [f"  {name:<10}: {value}" for name, value in facts.items()]


def _evidence(failure: Failure, failures: Failures) -> list[str]:
    report = failure.report
    if isinstance(report, messages.Failed):
        # The exception itself is not loaded: that would import what the script imports.
        said = report.traceback.rstrip()
        if report.kind == "SystemExit":
            said = report.unraisable
        elif report.kind == NoSuchScript.__name__ or not said:
            said = report.text
    else:
        # Without the others, whose exceptions would be loaded as well.
        said = str(dataclasses.replace(failures, failures=[failure]).exception)
    if isinstance(report, messages.Died):
        said = said.partition("\n")[2]  # the facts have the first line
    return ["", textwrap.indent(said, "  ")] if said else []
