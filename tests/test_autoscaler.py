"""Launches on a cluster that grows."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.growing import growing


@pytest.fixture(scope="module", params=["v2", pytest.param("v1", marks=pytest.mark.exhaustive)])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a cluster with either of Ray's two autoscalers."""
    kinds = {"big": {"CPU": 4, "GPU": 2}}
    with (
        tempfile.TemporaryDirectory() as folder,
        growing(Path(folder), kinds, most=2, v2=request.param == "v2") as address,
    ):
        yield address


pytestmark = pytest.mark.slow

v2_only = pytest.mark.parametrize("address", ["v2"], indirect=True)
"""The older one does not tell what it refuses."""


def drive(address: str, script: str) -> str:
    head = "import os, time, torchrunx_ray as trx\n"
    done = subprocess.run(
        [sys.executable, "-c", head + script],
        env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@v2_only
def test_what_no_node_type_can_hold_fails_soon(address: str) -> None:
    out = drive(
        address,
        """
begun = time.monotonic()
try:
    trx.Launcher(hostnames=1, workers_per_host=50, cpus_per_worker=1).run(os.getpid)
except trx.PlacementError as error:
    print(time.monotonic() - begun < 60)
    print(error)
""",
    )

    assert "True\nThe Ray cluster can never hold this launch: its autoscaler may" in out
    assert "a host needs 50 CPU" in out


def test_more_hosts_than_there_are_make_the_cluster_grow(address: str) -> None:
    out = drive(
        address,
        """
import logging
logging.basicConfig(level=logging.INFO, stream=__import__("sys").stdout, format="%(message)s")
launcher = trx.Launcher(hostnames=2, workers_per_host=2, gpus_per_worker=1, backend="gloo")
result = launcher.run(os.getpid)
print(len(result), len(result.hostnames))
""",
    )

    assert "\n4 2\n" in out
    assert "waiting for room in the Ray cluster, 0 s of 600 so far; the autoscaler " in out


@v2_only
@pytest.mark.exhaustive
def test_smallest_size_is_demanded_and_what_is_there_besides_is_taken(address: str) -> None:
    out = drive(
        address,
        """
options = dict(workers_per_host=4, cpus_per_worker=1, gpus_per_worker=0)

def until_asked():
    while trx.context().stop_asked is None and trx.context().world_size == 4:
        time.sleep(0.01)
    return trx.context().world_size

with trx.Launcher(hostnames=1, **options).session() as other:
    run = trx.Launcher(hostnames=(1, 2), resize_interval=0, **options).submit(until_asked)
    time.sleep(5)  # nothing asks for a third node, of which there can be none
    print(run.done())
print(*run.result())
print([each.why for each in run.result().attempts])
""",
    )

    assert "False\n" in out
    assert "\n8 8 8 8 8 8 8 8\n['resized', 'returned']\n" in out


@pytest.mark.exhaustive
def test_cluster_that_has_grown_to_its_end_and_is_busy_is_waited_for(address: str) -> None:
    """The newer autoscaler refuses such a group as it refuses one that can never be held."""
    out = drive(
        address,
        """
launcher = trx.Launcher(hostnames=2, workers_per_host=2, gpus_per_worker=1, backend="gloo")
with launcher.session():
    run = trx.Launcher(hostnames=1, workers_per_host=2, gpus_per_worker=1, backend="gloo").submit(os.getpid)
    time.sleep(4)
    assert not run.done()
print(len(run.result(timeout=60)), "of the one that waited")
""",
    )

    assert "2 of the one that waited" in out


@v2_only
def test_more_hosts_than_the_autoscaler_may_start(address: str) -> None:
    out = drive(
        address,
        """
try:
    trx.Launcher(hostnames=3, workers_per_host=2, gpus_per_worker=1, backend="gloo").run(os.getpid)
except trx.PlacementError as error:
    print(error)
""",
    )

    assert "its autoscaler may not start any suitable nodes" in out
