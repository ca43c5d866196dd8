"""What is different where hosts have addresses of their own; the rest is in test_core.py."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters.two_hosts import TwoHosts, namespaces_are_possible, two_hosts

pytestmark = pytest.mark.skipif(
    not namespaces_are_possible(), reason="needs root and a kernel that gives network namespaces"
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def run(hosts: TwoHosts) -> Callable[[str], str]:
    def run(script: str) -> str:
        done = hosts.drive(script)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_gloo_crosses_the_network(run: Callable[[str], str]) -> None:
    out = run(
        """
def total():
    import torch, torch.distributed as dist
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return value.item(), os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"]

result = trx.Launcher(hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=2).run(total)
print(list(result) == [(6.0, "10.77.0.11", "eth0")] * 4, sorted(result.hostnames))
"""
    )

    assert out == "True ['10.77.0.11', '10.77.0.12']\n"


@pytest.mark.slow
def test_command_runs_a_script_on_both_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nimport torch\nimport torch.distributed as dist\n"
        "dist.init_process_group('gloo')\ntotal = torch.tensor(dist.get_rank())\n"
        "dist.all_reduce(total)\ndist.barrier()\n"
        "sys.stdout.write(f\"{os.environ['GROUP_RANK']} {int(total)}\\n\")\n"
    )

    words = ["--nnodes=all", "--nproc-per-node=2", "-t=1", f"--log-dir={tmp_path / 'logs'}"]
    done = hosts.run("-m", "torchrunx_ray", *words, str(script))

    shown = sorted(done.stdout.splitlines())
    assert shown == ["[default0]:0 6", "[default0]:1 6", "[default1]:0 6", "[default1]:1 6"], (
        done.stderr
    )
    files = sorted((tmp_path / "logs").glob("*/attempt_0/*/stdout.log"))
    assert [path.read_text() for path in files] in (
        ["0 6\n", "0 6\n", "1 6\n", "1 6\n"],
        ["1 6\n", "1 6\n", "0 6\n", "0 6\n"],
    )


@pytest.mark.slow
def test_command_says_on_which_hosts_the_script_is_missing(hosts: TwoHosts, tmp_path: Path) -> None:
    done = hosts.run("-m", "torchrunx_ray", "--nnodes=2", str(tmp_path / "missing.py"))

    assert done.returncode == 1
    assert f"there is no {tmp_path}/missing.py on this host" in done.stderr


@pytest.mark.slow
def test_hosts_are_found_by_ip_and_keep_their_order(run: Callable[[str], str]) -> None:
    out = run(
        """
launcher = trx.Launcher(hostnames=["10.77.0.12", "10.77.0.11"], workers_per_host=1)
result = launcher.run(lambda: os.environ["MASTER_ADDR"])
print(result.hostnames, list(result))
"""
    )

    assert out == "('10.77.0.12', '10.77.0.11') ['10.77.0.12', '10.77.0.12']\n"


@pytest.mark.slow
def test_interface_that_the_user_names_is_kept(run: Callable[[str], str]) -> None:
    out = run(
        """
launcher = trx.Launcher(
    hostnames=2, workers_per_host=1, backend=None, extra_env_vars={"GLOO_SOCKET_IFNAME": "mine"}
)
print(list(launcher.run(lambda: os.environ["GLOO_SOCKET_IFNAME"])))
"""
    )

    assert out == "['mine', 'mine']\n"


@pytest.mark.slow
def test_elastic_agent_has_the_workers_of_both_hosts_also_after_a_restart(
    run: Callable[[str], str],
) -> None:
    out = run(
        """
from torch.distributed.launcher import api
from torchrunx_ray.elastic import RayElasticAgent

api.LocalElasticAgent = RayElasticAgent

def total():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()
    return value.item(), os.environ["GROUP_RANK"]

config = api.LaunchConfig(2, 2, 1, rdzv_backend="ray", max_restarts=1, monitor_interval=0.1)
print(api.elastic_launch(config, total)())
"""
    )

    assert out.splitlines()[-1] == "{0: (1.0, '0'), 1: (1.0, '1')}"


@pytest.mark.slow
def test_rank_of_the_other_host_that_does_not_join_is_named(
    run: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "late_on_one_host.py").write_text(
        "import os, time, torch.distributed as dist\n"
        "join = dist.init_process_group\n"
        "def hang(*args, **kwargs):\n"
        "    time.sleep(1000 if os.environ['GROUP_RANK'] == '1' else 0)\n"
        "    join(*args, **kwargs)\n"
        "dist.init_process_group = hang\n"
    )
    out = run(
        f"""
launcher = trx.Launcher(
    hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=1, timeout=5,
    preload=("torch", "torch.distributed", "late_on_one_host"),
    runtime_env={{"env_vars": {{"PYTHONPATH": "{tmp_path}"}}}},
)
try:
    launcher.run(os.getpid)
except trx.LaunchTimeoutError as error:
    print(error.missing.get(1), error, *error.__notes__)
"""
    )

    assert out.startswith("10.77.0.12 after 5 s the process group is still without "), out
    assert "rank 1: hang (late_on_one_host.py:4)" in out


@pytest.mark.slow
def test_raylet_of_the_other_host_that_is_killed_is_named_soon(
    run: Callable[[str], str],
) -> None:
    """The last test here: that host is lost afterwards."""
    out = run(
        """
import signal, time

def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])

def kill_raylet():
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        above = os.getppid()  # the template
        for _ in range(4):  # both keepers, agent, raylet
            above = parent(above)
        os.kill(above, signal.SIGKILL)
    time.sleep(1000)

launcher = trx.Launcher(hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=1)
launcher.run(os.getpid)
begun = time.monotonic()
try:
    launcher.run(kill_raylet)
except trx.AgentFailedError as error:
    print(error.hostname, time.monotonic() - begun < 12, error, *error.__notes__)
"""
    )

    # Ray puts the raylet's last log lines around it.
    assert "10.77.0.12 True the raylet, Ray's process for the node (pid " in out, out
    assert "kill_raylet (<string>:" in out
