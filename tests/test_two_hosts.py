"""What is different where hosts have addresses of their own; the rest is in test_core.py."""

from collections.abc import Callable, Iterator

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


def test_hosts_are_found_by_ip_and_keep_their_order(run: Callable[[str], str]) -> None:
    out = run(
        """
launcher = trx.Launcher(hostnames=["10.77.0.12", "10.77.0.11"], workers_per_host=1)
result = launcher.run(lambda: os.environ["MASTER_ADDR"])
print(result.hostnames, list(result))
"""
    )

    assert out == "('10.77.0.12', '10.77.0.11') ['10.77.0.12', '10.77.0.12']\n"


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
