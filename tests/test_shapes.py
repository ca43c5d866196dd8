"""The core of a launch, as test_core.py tests it, on clusters of other shapes."""

import subprocess
import sys

import pytest

from tests.clusters.raylets import raylets
from tests.clusters.two_hosts import IPS, namespaces_are_possible, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# The limit is below that of this file's tests, so that what hangs is told.
CORE = ["-m", "pytest", "-v", "--timeout=150", "tests/test_core.py"]


@pytest.mark.exhaustive
def test_core_works_on_three_raylets() -> None:
    with raylets(*[{"num_cpus": 2}] * 3) as cluster:
        command = [sys.executable, *CORE, f"--address={cluster.address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    not namespaces_are_possible(), reason="needs root and a kernel that gives network namespaces"
)
def test_core_works_on_two_hosts() -> None:
    with two_hosts() as hosts:
        done = hosts.run(*CORE, f"--address={IPS['trxh1']}:6379", timeout_s=580)

    assert done.returncode == 0, done.stdout + done.stderr
