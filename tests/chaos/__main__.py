"""The storm from a command line: `make chaos SEED=1 MINUTES=5`."""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import uuid
from collections import defaultdict
from pathlib import Path

import tests.conftest  # noqa: F401  # sets what Ray reads when it is imported
from tests.chaos.storm import SHAPES, Outcome, storm
from tests.traces import MARK


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="elastic")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    os.environ[MARK] = uuid.uuid4().hex
    with (
        # Ray prints the last lines of each dead raylet's log.
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        os.environ["TMPDIR"] = temporary
        outcome = storm(
            arguments.seed, arguments.minutes, Path(folder), say, SHAPES[arguments.shape]
        )
    say(summary(outcome))
    return len(outcome.wrong) > 0


def say(text: str) -> None:
    print(text, file=sys.__stdout__, flush=True)


def summary(outcome: Outcome) -> str:
    took_s = defaultdict[str, list[float]](list)
    for blow in outcome.blows:
        assert blow.ran_again_at is not None
        took_s[blow.kind].append(blow.ran_again_at - blow.at)
    lines = [f"\n{'':14}{'blows':>6}{'seconds until it ran on all nodes':>36}"]
    for kind, times in sorted(took_s.items()):
        median = sorted(times)[len(times) // 2]
        span = f"{min(times):.2f} to {max(times):.2f}, median {median:.2f}"
        lines.append(f"{kind:14}{len(times):6}{span:>36}")
    lines.append(f"{len(outcome.attempts)} attempts, {outcome.steps} steps")
    lines += [f"WRONG: {each}" for each in outcome.wrong] or ["as if nothing had happened"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
