"""As test_kill_matrix.py, where hosts have addresses of their own: victims on the second one.

Namespaces divide the network only: the process table that is compared is the machine's.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.clusters.two_hosts import IPS, TwoHosts, inside, namespaces_are_possible, two_hosts
from tests.conftest import SHOWN_AT_END
from tests.soon import SOON_S
from tests.traces import MARK, Traces
from tests.victims import MAY_RAISE, Driven, matrix, may_also

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not namespaces_are_possible(), reason="needs root and a kernel that gives namespaces"
    ),
]

CPUS = 8
MOMENTS = ("running", "reporting")
VICTIMS = ("worker", "all workers", "children", "template", "keeper", "agent", "driver")
CASES = [
    *((victim, moment) for moment in MOMENTS for victim in VICTIMS if victim != "children"),
    ("children", "running"),
    ("raylet", "running"),  # Ray takes 20 s to know of its end
]
IN_CI = [
    ("worker", "running"),
    ("driver", "running"),
]

# Its questions and answers are lines.
OBSERVER = """
import json, os, sys
from dataclasses import asdict
import ray
import torchrunx_ray as trx
from tests.traces import Traces

def traces():
    return asdict(Traces.now())

def launch_again():
    # Its agents stay from case to case, as part of what is there before.
    launcher = trx.Launcher(hostnames=HOSTNAMES, workers_per_host=2, linger=1000)
    return len(launcher.run(os.getpid))

ray.init(log_to_driver=False)
for question in sys.stdin:
    print("ANSWER", json.dumps(globals()[question.strip()]()), flush=True)
"""


class Observer:
    """A driver on the first host, from which the cluster can be seen."""

    def __init__(self, hosts: TwoHosts) -> None:
        script = OBSERVER.replace("HOSTNAMES", repr(list(IPS.values())))
        self._process = subprocess.Popen(
            [*inside("trxh1"), sys.executable, "-c", script],
            env={**hosts.of_driver, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def traces(self) -> Traces:
        return Traces(**json.loads(self._ask("traces")))

    def launch_again(self) -> int:
        return json.loads(self._ask("launch_again"))

    def close(self) -> None:
        self._process.communicate(timeout=20)

    def _ask(self, question: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return line.removeprefix("ANSWER ")
        raise EOFError(question)


@pytest.fixture(scope="module")
def outcomes(pytestconfig: pytest.Config) -> Iterator[dict[tuple[str, str], str]]:
    outcomes: dict[tuple[str, str], str] = {}
    yield outcomes
    pytestconfig.stash.setdefault(SHOWN_AT_END, []).append(
        f"On the second of two hosts:\n{matrix(outcomes, MOMENTS)}"
    )


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    folder = tempfile.mkdtemp(prefix="t")  # short, as Ray's sockets lie in it
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MARK, uuid.uuid4().hex)
        environment.setenv("TMPDIR", folder)
        environment.setattr(tempfile, "tempdir", None)
        with two_hosts() as hosts:
            yield hosts
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def observer(hosts: TwoHosts) -> Iterator[Observer]:
    observer = Observer(hosts)
    observer.launch_again()  # first touches of Ray's store
    yield observer
    observer.close()


@pytest.mark.parametrize(
    ("victim", "moment"),
    [pytest.param(*case, marks=[] if case in IN_CI else pytest.mark.exhaustive) for case in CASES],
)
def test_nothing_is_left_on_either_host(
    hosts: TwoHosts,
    observer: Observer,
    outcomes: dict[tuple[str, str], str],
    victim: str,
    moment: str,
    tmp_path: Path,
) -> None:
    before = observer.traces()
    environment = {**hosts.of_driver, "CLUSTER": hosts.of_driver["RAY_ADDRESS"]}
    driven = Driven(
        moment, tmp_path, environment, hostnames=list(IPS.values()), prefix=inside("trxh1")
    )
    driven.kill([victim])

    outcome, took_s = driven.wait_for_outcome()
    driven.leave()
    outcomes[victim, moment] = f"{outcome} {took_s:.1f}"
    is_raylet = victim == "raylet"
    if is_raylet:
        hosts.start_other_host()
    assert outcome in {MAY_RAISE[victim], *may_also(moment)}, driven.said
    assert took_s < SOON_S, driven.said

    def left() -> list[str]:
        return before.missing_from(observer.traces(), CPUS, raylet_was_renewed=is_raylet)

    assert processes.wait_until(lambda: left() == []), left()
    assert observer.launch_again() == 4
