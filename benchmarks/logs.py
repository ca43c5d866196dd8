"""Lines per second that reach log files and a handler, and the growth of the agent's memory.

One host, one Ray cluster, 4 workers without a process group. Each worker prints lines of 100 bytes as fast as it can.
The time of a launch that prints nothing is subtracted. The floor is four plain processes that print into files.

    python benchmarks/logs.py [--samples 5] [--lines 100000] [--workers 4]

torchrunx is measured as well if it is installed.
"""

import argparse
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from table import print_table

import torchrunx_ray as trx

LINE = "x" * 99


class Counting(logging.Handler):
    """A handler that does as little as possible."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        assert record.getMessage()
        self.count += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", help="where to write the rates, too")
    arguments = parser.parse_args()
    lines, workers = arguments.lines, arguments.workers
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    folder = Path(tempfile.mkdtemp())
    os.environ["TORCHRUNX_LOG_DIR"] = str(folder / "logs")
    questions: dict[str, Callable[[], float]] = {
        "floor: processes into files": lambda: floor(folder, workers, lines),
        "default files": lambda: default_files(folder, workers, lines),
        "a handler": lambda: to_handler(workers, lines),
        "nowhere": lambda: nowhere(workers, lines),
    }
    rates = measure(questions, arguments.samples)
    if importlib.util.find_spec("torchrunx") is not None:
        few = max(1, lines // 5)
        rates |= measure({"torchrunx: default files": lambda: torchrunx(workers, few)}, 3)
    print_table("lines per second", rates, digits=0)
    print(f"the agent's memory grew by {growth_of_agent(workers, lines) / 2**20:.1f} MiB at most")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rates, indent=1))
    shutil.rmtree(folder)


def measure(questions: dict[str, Callable[[], float]], samples: int) -> dict[str, list[float]]:
    """Measure the questions in turn, after one uncounted round."""
    rates: dict[str, list[float]] = {name: [] for name in questions}
    for sample in range(samples + 1):
        for name, question in questions.items():
            rate = question()
            if sample:
                rates[name].append(rate)
    return rates


def flood(lines: int) -> None:
    for _ in range(lines):
        print(LINE)


def timed(launcher: trx.Launcher, workers: int, lines: int) -> float:
    def launch(count: int) -> float:
        begun = time.perf_counter()
        launcher.run(flood, count)
        return time.perf_counter() - begun

    return workers * lines / (launch(lines) - launch(0))


def default_files(folder: Path, workers: int, lines: int) -> float:
    shutil.rmtree(folder / "logs", ignore_errors=True)
    rate = timed(
        trx.Launcher(workers_per_host=workers, backend=None, console_ranks=()), workers, lines
    )
    # The pattern skips the link `latest`, whose files would count twice.
    written = sum(path.read_text().count(LINE) for path in (folder / "logs").glob("2*/*.log"))
    assert written == workers * lines
    return rate


def to_handler(workers: int, lines: int) -> float:
    handler = Counting()
    launcher = trx.Launcher(workers_per_host=workers, backend=None, log_handlers=[handler])
    rate = timed(launcher, workers, lines)
    assert handler.count == workers * lines
    return rate


def nowhere(workers: int, lines: int) -> float:
    return timed(
        trx.Launcher(workers_per_host=workers, backend=None, log_handlers=None), workers, lines
    )


def floor(folder: Path, workers: int, lines: int) -> float:
    script = f"import sys\nsys.stdout.reconfigure(line_buffering=True)\nfor _ in range({lines}): print({LINE!r})"

    def run(code: str) -> float:
        begun = time.perf_counter()
        started: Sequence[subprocess.Popen[bytes]] = [
            subprocess.Popen([sys.executable, "-c", code], stdout=(folder / f"{i}").open("wb"))
            for i in range(workers)
        ]
        for process in started:
            process.wait()
        return time.perf_counter() - begun

    return workers * lines / (run(script) - run(""))


def growth_of_agent(workers: int, lines: int) -> int:
    """Return the growth of the agent's peak memory over its memory after a launch that prints nothing."""
    launcher = trx.Launcher(
        workers_per_host=workers, backend=None, console_ranks=(), name="measured"
    )

    def agent(_: int) -> int:
        pid = os.getpid()
        for _ in range(4):  # to the template, both keepers, and the agent
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid

    pid = launcher.run(agent, 0).rank(0)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak
    before = memory(pid, "VmRSS")
    launcher.run(flood, lines)
    return memory(pid, "VmHWM") - before


def memory(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in status if line.startswith(f"{name}:"))
    return kib * 1024


def torchrunx(workers: int, lines: int) -> float:
    from torchrunx import Launcher

    launcher = Launcher(hostnames=["localhost"], workers_per_host=workers, backend="gloo")

    def launch(count: int) -> float:
        begun = time.perf_counter()
        launcher.run(flood, count)
        return time.perf_counter() - begun

    return workers * lines / (launch(lines) - launch(0))


if __name__ == "__main__":
    main()
