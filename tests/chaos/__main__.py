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
from statistics import median

import tests.conftest  # noqa: F401  # sets what Ray reads when it is imported
from tests.chaos.storm import SHAPES, Outcome, storm
from tests.chaos.weather import Effect
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
    lines = [f"\n{'':16}{'blows':>6}{'ended an attempt':>18}{'seconds until the next step':>34}"]
    by_kind = defaultdict[str, list[Effect]](list)
    for effect in outcome.effects:
        by_kind[effect.blow.kind].append(effect)
    for kind, effects in sorted(by_kind.items()):
        ended = [effect for effect in effects if effect.ended is not None]
        took_s = [effect.step_after_s for effect in ended if effect.step_after_s is not None]
        times = f"median {median(took_s):.2f}, at most {max(took_s):.2f}" if took_s else ""
        lines.append(f"{kind:16}{len(effects):6}{len(ended):18}{times:>34}")
    counts = f"{len(outcome.effects)} blows, {len(outcome.attempts)} attempts"
    lines.append(f"{counts}, {outcome.steps} steps")
    lines += [f"WRONG: {each}" for each in outcome.wrong] or ["as if nothing had happened"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
