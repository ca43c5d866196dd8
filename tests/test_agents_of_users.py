"""Agents and programs that users build on torch's elastic agent, with ours in the place of torch's."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

import torchrunx_ray as trx
from tests.elastic import agent_of, spec_of
from tests.processes import wait_until
from torchrunx_ray.elastic import RayElasticAgent

pytestmark = pytest.mark.usefixtures("cluster")


def test_signal_to_a_program_that_has_not_called_ray_init_is_torchs_exception(
    tmp_path: Path, address: str
) -> None:
    """ray.init() installs a handler for SIGTERM, which came after the agent's."""
    (tmp_path / "program.py").write_text(PROGRAM)
    program = subprocess.Popen(
        [sys.executable, "program.py", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert wait_until(lambda: (tmp_path / "begun").exists(), 60)
        program.send_signal(signal.SIGTERM)
        said, _ = program.communicate(timeout=60)

    assert said == "SignalException SIGTERM\n"
    assert (tmp_path / "told").read_text() == "SIGTERM"


PROGRAM = """
import signal, sys, time
from pathlib import Path
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torchrunx_ray.elastic import RayElasticAgent, RayRendezvous

folder = Path(sys.argv[1])

def stay():
    def told(signum, frame):
        (folder / "told").write_text(signal.Signals(signum).name)
        sys.exit(1)
    for signum in signal.SIGTERM, signal.SIGINT:
        signal.signal(signum, told)
    (folder / "begun").touch()
    time.sleep(1000)

handler = RayRendezvous(RendezvousParameters("ray", "", "the run", 1, 1))
spec = WorkerSpec("trainer", 1, handler, entrypoint=stay, monitor_interval=0.01)
try:
    RayElasticAgent(spec, DefaultLogsSpecs()).run()
except SignalException as error:
    print("SignalException", error.sigval.name)
"""


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"restart_if": bool}, "torch's loop restarts after each failure"),
        ({"max_restarts": 3}, "max_restarts of the spec decides"),
    ],
)
def test_option_that_would_have_no_effect_is_an_error(option: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        agent_of(spec_of(int), launcher=trx.Launcher(**option))


class Changing(RayElasticAgent):
    """An agent that changes something before each start of its workers."""

    change: Callable[[WorkerSpec], None]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        type(self).change(worker_group.spec)
        return super()._start_workers(worker_group)


def test_variables_that_a_subclass_sets_before_the_start_reach_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OF_THE_RUN", "at first")
    Changing.change = lambda _: os.environ.update(OF_THE_RUN="at the start")
    os.environ.pop("PYTEST_CURRENT_TEST", None)

    result = Changing(spec_of(os.getenv, "OF_THE_RUN"), DefaultLogsSpecs()).run()

    assert result.return_values == {0: "at the start", 1: "at the start"}


def test_arguments_that_a_subclass_changes_too_late_are_an_error() -> None:
    def change(spec: WorkerSpec) -> None:
        spec.args = ("another",)

    Changing.change = change
    os.environ.pop("PYTEST_CURRENT_TEST", None)

    with pytest.raises(ValueError, match="has changed since the first rendezvous"):
        Changing(spec_of(os.getenv, "one"), DefaultLogsSpecs()).run()
