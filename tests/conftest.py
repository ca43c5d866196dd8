"""Real Ray for every test: one local cluster for the session, others where a test needs one."""

# The settings come before ray is imported, which is when it reads them.

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

# A cluster that somebody else started on this machine is not ours to test on.
os.environ.pop("RAY_ADDRESS", None)

# As `ray.init()` sets it for a Ray that it starts, and for all that its process starts after it.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)

# Ray's gRPC has handlers for forks, in which a process that forks may hang, or its child die.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# A worker of Ray costs 0.4 s of CPU, and a cluster would start one per CPU in case it is wanted.
os.environ.update(RAY_prestart_worker_first_driver="0")

# Most tests look at other things than log files.
os.environ["TORCHRUNX_LOG_DIR"] = ""

import cloudpickle
import pytest
import ray

import torchrunx_ray as trx
from tests import hung
from tests.clusters.shared import shared_ray
from tests.logs import Kept
from tests.processes import wait_until

SHOWN_AT_END = pytest.StashKey[list[str]]()
"""What tests have to show beside whether they passed."""


def pytest_configure(config: pytest.Config) -> None:
    # A shell without job control starts what is in its background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):  # a lane's: its /tmp is not the one that pytest-xdist means
        config.option.basetemp = None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a cluster of their module's in one lane; send what they define by value.

    A worker that imported the module of a test would import pytest and Ray with it, for 0.36 s of CPU.
    """
    for item in items:
        module = item.getparent(pytest.Module)
        assert module is not None
        if not module.get_closest_marker("by_reference"):
            cloudpickle.register_pickle_by_value(module.obj)
    for item in items:
        assert isinstance(item, pytest.Function)
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        scopes = {definition.scope for definitions in fixtures for definition in definitions}
        if "module" in scopes:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Check that pytest-xdist knows the groups: without them, each lane starts each module's cluster."""
    if getattr(session.config.option, "loadgroup", False):  # in a lane
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError(f"pytest-xdist has not taken {item.nodeid} into its group")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for text in config.stash.get(SHOWN_AT_END, []):
        terminalreporter.write_line(text)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Without the handlers that pytest gives the root logger, where a test asks for that."""
    handlers = logging.root.handlers
    if item.get_closest_marker("unconfigured_logging"):
        logging.root.handlers = []
    try:
        return (yield)
    finally:
        logging.root.handlers = handlers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """See what all processes are doing shortly before pytest-timeout ends a test that hangs."""
    marker = item.get_closest_marker("timeout")
    limit_s = float(marker.args[0] if marker else item.config.getini("timeout"))
    looking = threading.Timer(
        0.9 * limit_s, lambda: item.add_report_section("call", "processes", hung.seen())
    )
    looking.daemon = True
    looking.start()
    try:
        return (yield)
    finally:
        looking.cancel()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--address", help="of a cluster that most tests share, instead of a new one")


@pytest.fixture(scope="session")
def _ray(request: pytest.FixtureRequest) -> Iterator[None]:
    given = request.config.getoption("--address")
    with contextlib.nullcontext(given) if given else shared_ray() as address:
        ray.init(address, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def cluster(_ray: None) -> Iterator[None]:
    """The cluster that most tests share, and leave as free as they found it."""
    yield
    if ray.is_initialized():
        total = ray.cluster_resources()["CPU"]
        assert wait_until(lambda: ray.available_resources().get("CPU") == total, 30), (
            ray.available_resources(),
            ray.util.placement_group_table(),
        )


@pytest.fixture
def address(cluster: None) -> str:
    """The shared cluster's, for scripts: to join it costs 0.1 s of CPU, a Ray of their own 4 s."""
    return ray.get_runtime_context().gcs_address


@pytest.fixture
def joined(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts that a test starts join the shared cluster, unless they say otherwise."""
    monkeypatch.setenv("RAY_ADDRESS", address)


@pytest.fixture
def launcher(cluster: None) -> trx.Launcher:
    """Two workers on every host, on agents that stay warm from test to test."""
    # With this grace a rank that should end by SIGTERM and does not is taken for a hang.
    return trx.Launcher(workers_per_host=2, shutdown_timeout=30)


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def one(cluster: None, kept: Kept) -> trx.Launcher:
    """One worker without a process group, whose output is kept."""
    return trx.Launcher(workers_per_host=1, backend=None, log_handlers=[kept])


class RunScript(Protocol):
    def __call__(
        self, script: str, *, own_ray: Mapping[str, Any] | None = None
    ) -> "subprocess.CompletedProcess[str]": ...


@pytest.fixture
def run_script(address: str, tmp_path: Path) -> RunScript:
    """Run a user's script in a folder of its own.

    It joins the shared cluster; with `own_ray` it starts a Ray with these options of ray.init.
    """

    def run(
        script: str, *, own_ray: Mapping[str, Any] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        if own_ray is None:
            options = {"address": address}
        else:
            options = {"address": "local", "num_cpus": 4, "include_dashboard": False, **own_ray}
        path = tmp_path / "script.py"
        path.write_text(f"import ray; ray.init(**{options!r})\n{script}")
        return subprocess.run(
            [sys.executable, str(path)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run
