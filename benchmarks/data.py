"""Transfer times of arguments and results, relative to Ray and one copy.

One host, one Ray cluster. The baseline is `ray.put` and `ray.get` of the same bytes as a numpy array, and one copy of
them. It is measured in the same run, in turn with the rest. A result is timed from the function's return until the
driver has the tensor. An argument is timed from the call until the function begins on the last worker, minus the same
time for a launch without an argument.

    python benchmarks/data.py [--samples 5] [--sizes 1K,1M,64M,512M,1G] [--workers 8]

torchrunx is measured as well if it is installed, up to 512 MiB, since it takes minutes for more.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from table import print_table

import torchrunx_ray as trx

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
MIB = 2**20
ALL_RANKS = 4
"""Number of ranks that each return a value when the driver takes all values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--sizes", default="1K,1M,64M,512M,1G")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", help="where to write the times, too")
    arguments = parser.parse_args()
    times = {
        name: of_size(size_of(name), arguments.workers, arguments.samples)
        for name in arguments.sizes.split(",")
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(times, indent=1))


def size_of(name: str) -> int:
    return int(name[:-1]) * UNITS[name[-1]]


def of_size(size: int, workers: int, samples: int) -> dict[str, list[float]]:
    """Measure one size, with a Ray cluster of its own whose object store has room for it."""
    store = max(2 * ALL_RANKS * size, 80 * MIB)
    cpus = 2 * workers + ALL_RANKS + 1
    ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=store)
    tensor = torch.ones(size, dtype=torch.uint8)
    sessions = {count: open_session(count) for count in (1, ALL_RANKS, workers)}
    questions: dict[str, Callable[[], float]] = {
        "floor: one copy": lambda: one_copy(tensor),
        "baseline: put, get, copy": lambda: baseline(tensor),
        "result of one rank": lambda: result_of(1, sessions[workers], size),
        f"results of all {ALL_RANKS} ranks": lambda: result_of(
            ALL_RANKS, sessions[ALL_RANKS], size
        ),
        "launch without values": lambda: launch(sessions[workers], None),
        "launch with it in, and out of one": lambda: launch(sessions[workers], tensor),
    }
    if size >= MIB:  # the time for less is lost in the noise of a launch
        questions |= {
            "argument to 1 worker": lambda: argument(sessions[1], tensor),
            f"argument to {workers} workers": lambda: argument(sessions[workers], tensor),
        }
    times = measure(questions, samples)
    for session in sessions.values():
        session.close()
    if importlib.util.find_spec("torchrunx") is not None and size <= 512 * MIB:
        # Last, because memory is ten times slower for seconds after torchrunx has run.
        peers = {
            "torchrunx: result of one rank": lambda: torchrunx_result(size),
            "torchrunx: argument to 1 worker": lambda: torchrunx_argument(tensor),
        }
        times |= measure(peers, samples)
    ray.shutdown()
    report(times, size)
    return times


def measure(questions: dict[str, Callable[[], float]], samples: int) -> dict[str, list[float]]:
    """Measure the questions in turn, once per sample."""
    for question in questions.values():
        question()  # warm-up: Ray's object store is touched for the first time
    rounds = [{name: question() for name, question in questions.items()} for _ in range(samples)]
    return {name: [times[name] for times in rounds] for name in questions}


def open_session(workers: int) -> trx.Session:
    return trx.Launcher(hostnames=1, workers_per_host=workers, backend=None).session()


def one_copy(tensor: torch.Tensor) -> float:
    """Time a copy from touched memory to fresh memory."""
    begun = time.monotonic()
    copied = tensor.clone()
    taken = time.monotonic() - begun
    assert copied[-1] == 1
    return taken


def baseline(tensor: torch.Tensor) -> float:
    array = tensor.numpy()
    begun = time.monotonic()
    copied: Any = np.array(ray.get(ray.put(array)))
    taken = time.monotonic() - begun
    assert copied[-1] == 1
    return taken


def result_of(ranks: int, session: trx.Session, size: int) -> float:
    """Time from the first return of these ranks until the driver has all their tensors."""

    def make() -> tuple[float, torch.Tensor | None]:
        is_asked = int(os.environ["RANK"]) < ranks
        value = torch.ones(size, dtype=torch.uint8) if is_asked else None
        return time.monotonic(), value

    result = session.run(make)
    values = [result.rank(i) for i in range(ranks)]
    taken = time.monotonic() - min(returned for returned, _ in values)
    assert all(value is not None and value[-1] == 1 for _, value in values)
    return taken


def argument(session: trx.Session, tensor: torch.Tensor) -> float:
    return time_to_begin(session, tensor) - time_to_begin(session, None)


def time_to_begin(session: trx.Session, value: torch.Tensor | None) -> float:
    """Time from the call until the function begins on the last worker, with its argument."""

    def begin(_: torch.Tensor | None) -> float:
        return time.monotonic()

    called = time.monotonic()
    return max(session.run(begin, value)) - called


def launch(session: trx.Session, value: torch.Tensor | None) -> float:
    def give_back(value: torch.Tensor | None) -> torch.Tensor | None:
        return value if os.environ["RANK"] == "0" else None

    begun = time.monotonic()
    list(session.run(give_back, value))
    return time.monotonic() - begun


def torchrunx_result(size: int) -> float:
    def make() -> tuple[float, torch.Tensor]:
        value = torch.ones(size, dtype=torch.uint8)
        return time.monotonic(), value

    returned, _ = torchrunx().run(make).rank(0)
    return time.monotonic() - returned


def torchrunx_argument(tensor: torch.Tensor) -> float:
    def begin(_: torch.Tensor | None) -> float:
        return time.monotonic()

    def until_begun(value: torch.Tensor | None) -> float:
        called = time.monotonic()
        return torchrunx().run(begin, value).rank(0) - called

    return until_begun(tensor) - until_begun(None)


def torchrunx() -> Any:
    module: Any = importlib.import_module("torchrunx")
    return module.Launcher(hostnames=["localhost"], workers_per_host=1, backend="gloo")


def report(times: dict[str, list[float]], size: int) -> None:
    base = statistics.median(times["baseline: put, get, copy"])
    words = f"{size // MIB} MiB" if size >= MIB else f"{size} bytes"

    def speed(name: str, median: float) -> str:
        if name.startswith("launch"):
            return ""
        moved = ALL_RANKS * size if name.startswith("results") else size
        return f"{moved / median / 1e9:5.2f}   {median / base:.2f}x"

    print()
    print_table(f"{words}; seconds", times, last_head=" GB/s   of the baseline", last=speed)


if __name__ == "__main__":
    main()
