"""Each agent answers health checks over HTTP while a run claims it."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.clusters.raylets import raylets
from tests.clusters.started import free_port
from tests.processes import above, note, wait_until
from tests.soon import SOON_S
from torchrunx_ray.agent.condition import Condition
from torchrunx_ray.agent.services import Services

Answer = tuple[int, dict[str, Any]]


@pytest.fixture
def checked(cluster: None) -> trx.Launcher:
    return trx.Launcher(workers_per_host=2, backend=None, health_check_port=0)


def get(address: str) -> Answer:
    try:
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def addresses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return re.findall(r"answers health checks at http://(\S+)", caplog.text)


def refuses(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it is being closed
        return False
    return False


@contextlib.contextmanager
def running(
    launcher: trx.Launcher, caplog: pytest.LogCaptureFixture, folder: Path
) -> Iterator[tuple[str, trx.Run[Any]]]:
    """Hold a run whose workers wait, and yield where its agent answers."""

    def train() -> None:
        note(folder / f"pid{os.environ['RANK']}", os.getpid())
        print("begun", flush=True)
        signal.pause()

    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        run = launcher.submit(train)
        for rank in range(2):
            assert wait_until((folder / f"pid{rank}").exists, 60)
        assert wait_until(lambda: bool(addresses(caplog)))
    try:
        yield addresses(caplog)[-1], run
    finally:
        run.kill()
        run.wait()


def test_healthy_agent_tells_its_attempt_and_workers(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with running(checked, caplog, tmp_path) as (address, run):
        assert wait_until(
            lambda: [w["state"] for w in get(address)[1]["workers"]] == ["HEALTHY"] * 2
        )
        status, told = get(address)

        assert status == 200
        assert (told["version"], told["healthy"], told["reason"]) == (1, True, "")
        assert (told["run"], told["attempt"]) == (run.name, 0)
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
        assert [(w["rank"], w["pid"], w["state"]) for w in told["workers"]] == [
            (0, pids[0], "HEALTHY"),
            (1, pids[1], "HEALTHY"),
        ]
        assert all(0 <= worker["silent_s"] < 30 for worker in told["workers"])
        assert told["loop_silent_s"] < 5
        assert told["watchdog_silent_s"] is None


def test_port_is_closed_while_the_agent_rests_and_open_again_in_the_next_run(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fixed = dataclasses.replace(checked, health_check_port=free_port())
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with running(fixed, caplog, tmp_path / name) as (address, _run):
            assert address.endswith(f":{fixed.health_check_port}")
            assert get(address)[0] == 200
        assert wait_until(lambda: refuses(address))


def test_failed_attempt_is_503_with_the_reason_until_the_next_begins(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def train() -> int:
        if trx.context().attempt == 0 and os.environ["RANK"] == "1":
            raise ValueError("no batch")
        if trx.context().attempt == 0:
            signal.signal(signal.SIGTERM, lambda *_: None)
            assert wait_until((tmp_path / "may_end").exists, 60)
            return 0
        note(tmp_path / "attempt1", "")
        assert wait_until((tmp_path / "may_return").exists, 60)
        return trx.context().restarts

    launcher = dataclasses.replace(checked, max_restarts=1, shutdown_timeout=60)
    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        run = launcher.submit(train)
        assert wait_until(lambda: bool(addresses(caplog)), 60)
    (address,) = addresses(caplog)

    assert wait_until(lambda: get(address)[0] == 503, 60)
    assert get(address)[1]["reason"] == "rank 1 raised ValueError"
    assert [worker["state"] for worker in get(address)[1]["workers"]] == ["HEALTHY", "FAILED"]
    (tmp_path / "may_end").touch()
    assert wait_until((tmp_path / "attempt1").exists, 60)
    status, told = get(address)
    assert (status, told["attempt"]) == (200, 1)
    (tmp_path / "may_return").touch()
    assert list(run.result(timeout=60)) == [1, 1]


def test_dead_template_is_503(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    seen: list[Answer] = []
    with running(checked, caplog, tmp_path) as (address, _run):
        template = above(int((tmp_path / "pid0").read_text()))["template"]

        def watch() -> None:
            with contextlib.suppress(OSError):
                while not seen:
                    answer = get(address)
                    seen.extend([answer] if answer[0] == 503 else [])

        watching = threading.Thread(target=watch)
        watching.start()
        os.kill(template, signal.SIGKILL)
        watching.join(30)
    assert seen
    assert "the template process, from which workers are forked, died" in seen[0][1]["reason"]


def test_variable_asks_for_the_port_as_with_torch(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    port = free_port()
    launcher = dataclasses.replace(
        checked,
        health_check_port=None,
        extra_env_vars={"TORCHELASTIC_HEALTH_CHECK_PORT": f"{port}"},
    )
    with running(launcher, caplog, tmp_path) as (address, _run):
        assert address.endswith(f":{port}")
        assert get(address)[0] == 200


def test_watchdog_is_part_of_the_answer(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    variables = {"TORCHELASTIC_ENABLE_FILE_TIMER": "1"}
    with running(dataclasses.replace(checked, extra_env_vars=variables), caplog, tmp_path) as (
        address,
        _run,
    ):
        assert wait_until(lambda: 0 <= get(address)[1]["watchdog_silent_s"] < 5)


def test_agent_is_healthy_again_after_a_run_that_failed(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("no batch")

    with caplog.at_level(logging.INFO, "torchrunx_ray"), checked.session() as session:
        with pytest.raises(ValueError, match="no batch"):
            session.run(fail)
        (address,) = addresses(caplog)
        status, told = get(address)
        assert (status, told["healthy"], told["run"]) == (200, True, None)
        assert list(session.run(int)) == [0, 0]


def test_port_is_closed_at_once_without_linger(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        dataclasses.replace(checked, linger=0).run(int)
    assert wait_until(lambda: refuses(addresses(caplog)[0]))


def test_port_that_needs_rights_is_an_error_that_says_so() -> None:
    code = """
import os, socket
from torchrunx_ray.agent.health import HealthPortError, HealthServer
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    HealthServer("127.0.0.1", 80, dict)
except HealthPortError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if (
        os.geteuid() != 0
        or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 81
    ):
        pytest.skip("needs root, and a kernel that protects port 80")
    assert "127.0.0.1:80, cannot be opened: Permission denied. Ports below 1024 need" in said.stdout


def test_port_in_use_is_an_error_and_starts_nothing(checked: trx.Launcher, tmp_path: Path) -> None:
    def train() -> None:
        (tmp_path / "started").touch()

    with socket.create_server(("0.0.0.0", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(trx.LaunchError, match=rf":{port}, cannot be opened: Address already"):
            dataclasses.replace(checked, health_check_port=port).run(train)
    assert not (tmp_path / "started").exists()
    assert len(dataclasses.replace(checked, health_check_port=port).run(os.getpid)) == 2


@pytest.mark.parametrize("port", ["http", "70000", "-1"])
def test_variable_that_names_no_port_is_an_error(checked: trx.Launcher, port: str) -> None:
    variables = {"TORCHELASTIC_HEALTH_CHECK_PORT": port}
    launcher = dataclasses.replace(checked, health_check_port=None, extra_env_vars=variables)
    with pytest.raises(ValueError, match=f"TORCHELASTIC_HEALTH_CHECK_PORT='{port}'"):
        launcher.run(os.getpid)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"200"),
        (b"HEAD / HTTP/1.0\r\n\r\n", b"200"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 100_000, b"405"),
        (b"\x00\xff\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000, b"400"),
        (b"", b"400"),
    ],
)
def test_any_request_gets_an_answer(
    checked: trx.Launcher,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    request_: bytes,
    status: bytes,
) -> None:
    with running(checked, caplog, tmp_path) as (address, _run):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request_)
                connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100).startswith(b"HTTP/1.1 " + status)
        assert get(address)[0] == 200


@pytest.mark.slow
def test_many_slow_clients_disturb_neither_the_checks_nor_the_run(
    checked: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    end = threading.Event()

    def drip(address: str) -> None:
        host, _, port = address.rpartition(":")
        while not end.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as slow:
                while not end.wait(1):
                    slow.sendall(b"G")

    fixed = dataclasses.replace(checked, health_check_port=free_port())
    with (
        running(fixed, caplog, tmp_path) as (address, run),
        concurrent.futures.ThreadPoolExecutor(200) as clients,
    ):
        try:
            for _ in range(200):
                clients.submit(drip, address)
            for _ in range(10):
                begun = time.monotonic()
                assert get(address)[0] == 200
                assert run.stacks()
                assert time.monotonic() - begun < SOON_S
                end.wait(0.5)
        finally:
            end.set()


@pytest.mark.slow
def test_blocked_event_loop_is_503() -> None:
    async def block() -> Answer:
        services = Services("127.0.0.1", Condition())
        assert await services.open(None, 0) is None
        address = f"127.0.0.1:{services.health_port}"
        with concurrent.futures.ThreadPoolExecutor() as others:
            answer = others.submit(ask_after, 5.5, address).result()  # blocks the loop
        await asyncio.sleep(0.6)
        assert (await asyncio.to_thread(get, address))[0] == 200
        await services.close()
        return answer

    status, told = asyncio.run(block())

    assert status == 503
    assert re.fullmatch(r"the agent's event loop has been blocked for \d\.\d s", told["reason"])


def ask_after(delay_s: float, address: str) -> Answer:
    time.sleep(delay_s)
    return get(address)


@pytest.mark.slow
def test_hosts_on_one_node_have_ports_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    with (
        raylets({"num_cpus": 1}, {"num_cpus": 1}),
        caplog.at_level(logging.INFO, "torchrunx_ray"),
    ):
        trx.Launcher(hostnames=2, workers_per_host=1, backend=None, health_check_port=0).run(int)
    assert len(set(addresses(caplog))) == 2


def test_without_the_option_no_port_is_open(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        trx.Launcher(workers_per_host=1, backend=None).run(int)
    assert not addresses(caplog)
