"""All benchmarks in one run: `make bench`.

Each benchmark is a script that can be run alone with other sizes; its docstring says what it measures. The figures are
collected in results.json, and the launches are plotted in docs/launch.svg.

    python benchmarks/run.py [--quick] [--only launch_peers,logs]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLOT = HERE.parent / "docs" / "launch.svg"

QUESTIONS = {
    "launch_peers": (["--samples", "5"], ["--samples", "1", "--launches", "no_op:2,4"]),
    "launch": (["--samples", "5"], ["--samples", "1"]),
    "failures": (["--samples", "10"], ["--samples", "2", "--peer-samples", "1"]),
    "restarts": (["--samples", "10"], ["--samples", "2", "--peer-samples", "1"]),
    "data": (["--samples", "5"], ["--samples", "2", "--sizes", "1K,64M"]),
    "logs": (["--samples", "5"], ["--samples", "1"]),
    "hosts": (["--samples", "5"], ["--samples", "2", "--hosts", "1,2,4", "--workers", "1,8"]),
    "agents": (["--samples", "5"], ["--samples", "2", "--hosts", "25,100"]),
    "reads": ([], []),
}
"""Arguments of each script, and its arguments with --quick."""

PACKAGES = ("torch", "ray", "torchrunx", "torchmonarch", "torchrunx-ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, for a first look")
    parser.add_argument("--only", default=",".join(QUESTIONS))
    arguments = parser.parse_args()
    path = HERE / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = machine()
    for name in arguments.only.split(","):
        print(f"\n== {name}", flush=True)
        results[name] = ask(name, QUESTIONS[name][arguments.quick])
        path.write_text(json.dumps(results, indent=1) + "\n")
    if "launch_peers" in results:
        draw(results["launch_peers"], PLOT)


def ask(name: str, options: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, str(HERE / f"{name}.py"), *options, "--json", str(answer)]
        environment = {**os.environ, "TORCHRUNX_LOG_DIR": ""}
        subprocess.run(command, cwd=folder, env=environment, check=True)
        return json.loads(answer.read_text())


def machine() -> dict[str, str]:
    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "when": datetime.now().isoformat(timespec="minutes"),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
    }


def draw(times: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot cold launches of a no-op over the number of workers, and our warm launches."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "torchrunx_ray"}
    )  # small files that do not change between runs
    plots = {
        "torchrunx_ray: cold": "torchrunx_ray",
        "torchrunx_ray: warm": "torchrunx_ray, next launch",
        "monarch: cold": "Monarch",
        "torchrun: cold": "torchrun",
        "torchrunx: cold": "torchrunx",
        "ray train: cold": "Ray Train",
        "floor: import torch: whole process": "import torch",
    }
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for row, label in plots.items():
        points = [
            (int(name.split()[1]), statistics.median(seen[row]))
            for name, seen in times.items()
            if name.startswith("no_op") and row in seen
        ]
        if points:
            is_floor = label == "import torch"
            style = {"linestyle": ":", "color": "gray"} if is_floor else {"marker": "o"}
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **style)
    axes.set(xlabel="workers on one host", ylabel="seconds from the call to the results")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
