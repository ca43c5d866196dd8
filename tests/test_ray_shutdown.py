"""ray.shutdown() ends the launches that run or wait, and no other cluster is asked for them."""

import subprocess
from collections.abc import Callable

import pytest


@pytest.mark.slow
def test_ray_shutdown_ends_the_runs_and_a_new_ray_can_be_used(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """They never ended, and asking Ray for their end made it join some other cluster."""
    done = run_script(
        """
import os, time, torchrunx_ray as trx
def begin():
    open("begun", "w").close()
    time.sleep(1000)

launcher = trx.Launcher(workers_per_host=1)
run = launcher.submit(begin)
while not os.path.exists("begun"):
    time.sleep(0.01)
ray.shutdown()
try:
    run.result(timeout=30)
except trx.AgentFailedError as error:
    print(type(error).__name__)
assert not ray.is_initialized()
ray.init(address="local", num_cpus=4, include_dashboard=False)
print(launcher.run(lambda: "well").rank(0))
"""
    )

    lines = done.stdout.splitlines()  # Ray may have something to tell as well
    # Ray ends the agent on its way out, and that may be heard first.
    assert "AgentFailedError" in lines, done.stdout + done.stderr
    assert lines[-1] == "well"


@pytest.mark.slow
def test_ray_shutdown_that_takes_long_ends_what_runs_and_what_waits_but_not_the_driver(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """Ray ends a process, without a word, in which a thread frees a reference once its own part is gone.

    It is so for milliseconds before Python knows, and for longer on a busy machine.
    """
    done = run_script(
        """
import os, time, torchrunx_ray as trx

class LateToKnow:
    def __init__(self, core):
        self.core = core
    def __getattr__(self, name):
        return getattr(self.core, name)
    def shutdown_driver(self):
        self.core.shutdown_driver()
        time.sleep(1.5)

def begin():
    open("begun", "a").close()
    time.sleep(1000)

launcher = trx.Launcher(workers_per_host=1, cpus_per_worker=ray.cluster_resources()['CPU'])
first = launcher.submit(begin)
while not os.path.exists("begun"):
    time.sleep(0.01)
waiting = launcher.submit(begin)
time.sleep(1)  # nothing tells that it waits
worker = ray._private.worker.global_worker
worker.core_worker = LateToKnow(worker.core_worker)
ray.shutdown()
for run in (first, waiting):
    try:
        run.result(timeout=30)
    except trx.LaunchError as error:
        print(type(error).__name__)
assert not ray.is_initialized()
"""
    )

    lines = done.stdout.splitlines()
    assert "AgentFailedError" in lines, done.stderr
    assert "ClusterLeft" in lines, done.stderr


@pytest.mark.slow
def test_values_and_sessions_of_a_ray_that_is_gone_say_so(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """They started a Ray anew, and looked for themselves in it."""
    done = run_script(
        """
import torchrunx_ray as trx
launcher = trx.Launcher(workers_per_host=1, backend=None)
result, session = launcher.run(int), launcher.session()
ray.shutdown()
def say():
    for ask in (lambda: result.rank(0), lambda: session.run(int)):
        try: ask()
        except trx.LaunchError as error: print(error)
say()
print(ray.is_initialized())
ray.init(address="local", num_cpus=1, include_dashboard=False)
say()
"""
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    assert lines[2] == "False"
    assert lines[:2] == lines[3:]
    assert lines[0].startswith(
        "the value that rank 0 returned is gone, because the driver has left the Ray cluster"
    )
    assert lines[1].startswith(
        "the session's hosts are gone, because the driver has left the Ray cluster"
    )
