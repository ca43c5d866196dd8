"""hostnames="slurm", with stand-ins for Slurm's own commands; what it counts is in test_hosts.py."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.allocation import (
    NAMES,
    allocated,
    run_batch_script,
    scontrol_of_plain_lists,
    stand_in_scontrol,
)
from tests.clusters.two_hosts import TwoHosts, namespaces_are_possible, two_hosts
from tests.conftest import RunScript
from torchrunx_ray.driver.placing import slurm

PAGE = (Path(__file__).parents[1] / "docs/slurm.md").read_text()

needs_hosts = pytest.mark.skipif(
    not namespaces_are_possible(), reason="needs root and a kernel that gives network namespaces"
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    names = {host: (*called, f"gpu-{called[1]}") for host, called in NAMES.items()}
    with two_hosts(names=names) as hosts:
        yield hosts


Launched = Callable[..., Any]

LAUNCHES = """
import json
launcher = trx.Launcher(hostnames="slurm", workers_per_host="slurm", backend=None)
for nodes in NODES:
    os.environ["SLURM_JOB_NODELIST"] = nodes
    try:
        result = launcher.run(lambda: (os.environ["RANK"], os.uname().nodename))
        print(json.dumps([result.hostnames, list(result)]))
    except trx.PlacementError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def launched(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """What launches in allocations of nodes with these names came to, all by one driver."""
    allocations = ["node1,node2", "node2,node1", "gpu-node1,gpu-node2", "node1,node2,node3"]
    slurm = {
        "PATH": f"{scontrol_of_plain_lists(tmp_path_factory.mktemp('slurm'))}:{os.environ['PATH']}",
        "SLURM_JOB_CPUS_PER_NODE": "2,3",
    }
    done = hosts.drive(f"os.environ.update({slurm!r})\nNODES = {allocations!r}\n{LAUNCHES}")
    assert done.returncode == 0, done.stderr
    outcomes = dict(zip(allocations, map(json.loads, done.stdout.splitlines()), strict=True))
    return lambda *nodes: outcomes[",".join(nodes)]


ON_NODE1 = [[str(rank), "node1.cluster"] for rank in range(2)]
ON_NODE2 = [[str(rank), "node2.cluster"] for rank in range(2, 5)]


@pytest.mark.slow
@needs_hosts
def test_short_names_of_slurm_are_those_of_hosts_with_a_domain(launched: Launched) -> None:
    assert launched("node1", "node2") == [["node1", "node2"], ON_NODE1 + ON_NODE2]


@pytest.mark.slow
@needs_hosts
def test_order_of_the_allocation_is_that_of_the_ranks(launched: Launched) -> None:
    names, ranks = launched("node2", "node1")

    assert names == ["node2", "node1"]
    assert ranks[:2] == [["0", "node2.cluster"], ["1", "node2.cluster"]]


@pytest.mark.slow
@needs_hosts
def test_name_that_no_host_gives_itself_is_looked_up(launched: Launched) -> None:
    """Slurm's NodeName need not be a hostname."""
    assert launched("gpu-node1", "gpu-node2") == [["gpu-node1", "gpu-node2"], ON_NODE1 + ON_NODE2]


@pytest.mark.slow
@needs_hosts
def test_node_of_the_allocation_without_ray_is_named(launched: Launched) -> None:
    out = launched("node1", "node2", "node3")

    assert out.startswith(
        'hostnames="slurm": this Ray cluster has no live node for node3 of the allocation.\n'
        "Live nodes: node1.cluster (10.77.0.11, "
    )
    assert "--address node1:6379 --min-nodes 3 -- python train.py" in out


FAILING_LAUNCH = """
try:
    trx.launch(os.getpid, hostnames="slurm", workers_per_host=1)
except trx.PlacementError as error:
    print(error)
"""


@pytest.mark.slow
def test_where_no_ray_runs_the_error_shows_the_command_that_starts_it(
    run_script: RunScript, tmp_path: Path
) -> None:
    slurm = {
        "PATH": f"{stand_in_scontrol(tmp_path, ['node1', 'node2'])}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    script = f"import os, torchrunx_ray as trx\nos.environ.update({slurm!r})\n{FAILING_LAUNCH}"
    done = run_script(script, own_ray={})

    assert done.returncode == 0, done.stderr
    assert "found no Ray in this allocation. It started its own Ray" in done.stdout
    assert "does not have node1, node2" in done.stdout
    (command,) = re.findall(r"^  (srun .*)$", done.stdout, re.M)
    assert command == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 ray symmetric-run --address node1:6379 "
        "--min-nodes 2 -- python train.py"
    )


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Let this process be in an allocation of these nodes and variables; the path of its scontrol."""
    for name in os.environ:
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)

    def allocation(*nodes: str, **variables: str) -> Path:
        folder = stand_in_scontrol(tmp_path, nodes)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        for name, value in {"SLURM_JOB_NODELIST": "n[1-2]", **variables}.items():
            monkeypatch.setenv(name, value)
        return folder / "scontrol"

    return allocation


def test_node_that_scontrol_names_twice_is_one_host(allocation: Callable[..., Path]) -> None:
    allocation("node1", "node2", "node1")

    assert slurm.hosts() == ["node1", "node2"]


def test_allocation_in_which_scontrol_finds_no_node_is_said(
    allocation: Callable[..., Path],
) -> None:
    allocation("")

    with pytest.raises(RuntimeError, match=r"`scontrol show hostnames n\[1-2\]` shows no node"):
        slurm.hosts()


def test_scontrol_that_cannot_be_run_is_said(allocation: Callable[..., Path]) -> None:
    allocation("node1").chmod(0o644)

    with pytest.raises(
        RuntimeError, match='hostnames="slurm": scontrol cannot be run: Permission denied'
    ):
        slurm.hosts()


@pytest.mark.parametrize(
    ("variables", "workers"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, [4, 4]),
        ({"SLURM_GPUS_ON_NODE": "gpu:2"}, [2, 2]),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, [4, 4]),
        ({"SLURM_GPUS_PER_NODE": "gpu:a100:2,gpu:v100:1"}, [3, 3]),
        ({"SLURM_GPUS_PER_NODE": "4(x2)"}, [4, 4]),
        ({"SLURM_GPUS_PER_NODE": "a100:4,2"}, [6, 6]),
        ({"SLURM_GPUS_PER_NODE": "a100:4(x1),a100:2(x1)"}, [4, 2]),
        ({"SLURM_JOB_GPUS": "0-3"}, [4, 4]),
        ({"SLURM_JOB_GPUS": "0,2-3,7"}, [4, 4]),
        ({"SLURM_JOB_GPUS": "5"}, [1, 1]),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_CPUS_PER_NODE": "3,2"}, [3, 2]),
        ({"SLURM_JOB_CPUS_PER_NODE": "72(x2)"}, [72, 72]),
        ({"SLURM_CPUS_ON_NODE": "8"}, [8, 8]),
    ],
    ids=str,
)
def test_counts_are_read_as_slurm_writes_them(
    allocation: Callable[..., Path], variables: dict[str, str], workers: list[int]
) -> None:
    allocation(**variables)

    assert slurm.workers_per_host(2) == workers


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_GPUS_PER_NODE": "a100"},
        {"SLURM_GPUS_ON_NODE": "many"},
        {"SLURM_GPUS_ON_NODE": "-1"},
        {"SLURM_JOB_CPUS_PER_NODE": "4*2"},
    ],
    ids=str,
)
def test_count_that_cannot_be_read_is_shown_with_its_variable(
    allocation: Callable[..., Path], variables: dict[str, str]
) -> None:
    allocation(**variables)
    ((name, value),) = variables.items()

    with pytest.raises(RuntimeError, match=rf"{name}={re.escape(repr(value))} is not a count"):
        slurm.workers_per_host(2)


def test_allocation_without_gpus_and_without_a_count_of_cpus_says_which_are_set(
    allocation: Callable[..., Path],
) -> None:
    """It said that SLURM_GPUS_ON_NODE is not set."""
    allocation(SLURM_GPUS_ON_NODE="0")

    with pytest.raises(RuntimeError) as caught:
        slurm.workers_per_host(2)
    assert "This allocation has no GPUs (SLURM_GPUS_ON_NODE='0')" in str(caught.value)
    assert "SLURM_JOB_CPUS_PER_NODE is not set" in str(caught.value)


def sbatch_scripts() -> list[str]:
    return re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", PAGE, re.M | re.S)


TRAIN = """
import json, os, sys
import torch, torch.distributed as dist
import torchrunx_ray as trx

def train():
    value = torch.tensor(dist.get_rank())
    dist.all_reduce(value)
    return value.item(), os.environ["LOCAL_RANK"]

result = trx.launch(train, hostnames="slurm", workers_per_host="slurm")
json.dump([result.hostnames, list(result)], open("seen", "w"))
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)  # Ray's own waits come in steps of 5 s
@needs_hosts
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(sbatch_scripts()[0], id="symmetric-run"),
        pytest.param(sbatch_scripts()[1], id="ray start", marks=pytest.mark.exhaustive),
    ],
)
def test_scripts_of_the_docs_launch_on_both_nodes_and_pass_the_exit_status_on(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    environment = f"source {Path(sys.prefix, 'bin/activate')}"
    (line,) = re.findall(r"^source .*$", script, re.M)

    with allocated(tmp_path) as slurm:
        status, output = run_batch_script(script.replace(line, environment), tmp_path, slurm)

    assert status == 7, output
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen == [["node1", "node2"], [[6, "0"], [6, "1"], [6, "0"], [6, "1"]]]


COMMAND = "torchrunx-ray --nnodes all --nproc-per-node 2 train.py"


@pytest.mark.exhaustive
@pytest.mark.timeout(240)
@needs_hosts
def test_script_of_the_docs_runs_the_command(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os\nimport torch\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "total = torch.tensor(dist.get_rank())\ndist.all_reduce(total)\ndist.barrier()\n"
        "open(f\"seen {os.environ['GROUP_RANK']} {os.environ['LOCAL_RANK']} {int(total)}\", 'w')\n"
    )
    assert COMMAND in PAGE
    script = sbatch_scripts()[0].replace("python train.py", COMMAND)
    environment = f"source {Path(sys.prefix, 'bin/activate')}"

    with allocated(tmp_path) as slurm:
        line = "source .venv/bin/activate"
        status, output = run_batch_script(script.replace(line, environment), tmp_path, slurm)

    assert status == 0, output
    seen = sorted(path.name for path in tmp_path.glob("seen *"))
    assert seen == [f"seen {host} {local_rank} 6" for host in (0, 1) for local_rank in (0, 1)]
