"""Which interface a host's address is on, as gloo wants to know."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.clusters.two_hosts import namespaces_are_possible
from torchrunx_ray.agent.machine.network import interface_of

FURTHER = "198.51.100.77"


@pytest.fixture
def further_address() -> Iterator[str]:
    subprocess.run(["ip", "addr", "add", f"{FURTHER}/32", "dev", "lo"], check=True)
    yield FURTHER
    subprocess.run(["ip", "addr", "del", f"{FURTHER}/32", "dev", "lo"], check=True)


def test_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of(FURTHER) is None
    assert interface_of("fd00::2") is None


@pytest.mark.skipif(not namespaces_are_possible(), reason="needs root, to give an address")
def test_interface_of_a_further_address(further_address: str) -> None:
    """As keepalived gives one, and clouds do."""
    assert interface_of(further_address) == "lo"
