"""What the documentation tells users to run works."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart_learns_and_ranks_agree(joined: None, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )

    *steps, learned, equal = done.stdout.splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert learned.startswith("learned y = 2.8")
    assert equal == "both ranks hold equal parameters: True"
