"""A RAY_ADDRESS that leads nowhere is told in seconds; Ray itself tries for minutes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters.started import free_port
from torchrunx_ray import LaunchError
from torchrunx_ray.driver.cluster import head_address


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_address, "_PATIENCE_S", 0.1)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "nowhere.invalid", "ray://127.0.0.1"]
)
def test_address_where_nobody_listens_is_an_error(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{host}:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(LaunchError) as caught:
        head_address.check()

    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: nobody answers there (")


@pytest.mark.parametrize("address", ["auto", "local", "ray://head", "", "head:0x1"])
def test_address_that_is_no_host_and_port_is_left_to_ray(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    head_address.check()


def test_head_that_begins_to_listen_meanwhile_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_address, "_PATIENCE_S", 60)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"localhost:{head.getsockname()[1]}")
        monkeypatch.setattr("time.sleep", lambda _: head.listen())
        head_address.check()


def test_launch_tells_of_it_before_it_calls_ray(tmp_path: Path) -> None:
    script = (
        "import torchrunx_ray as trx\n"
        "from torchrunx_ray.driver.cluster import head_address\n"
        "head_address._PATIENCE_S = 0.1\n"
        "trx.launch(print, hostnames=1, workers_per_host=1)"
    )
    address = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert f"LaunchError: RAY_ADDRESS={address}: nobody answers there" in done.stderr
    assert "Connecting to existing Ray cluster" not in done.stderr
