"""What template and store do for the workers that are forked."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchrunx_ray as trx

STORE = """
import resource, socket
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
from torchrunx_ray.worker.store import serve
listening = socket.create_server(("127.0.0.1", 0))
port = listening.getsockname()[1]
print(port, flush=True)
serve(listening.detach(), port)
"""

CLIENTS = """
import sys
from datetime import timedelta
import torch.distributed as dist
from torchrunx_ray.worker.dns import never_ask_dns
never_ask_dns()
patience = timedelta(seconds=5)
clients = [dist.TCPStore("127.0.0.1", int(sys.argv[1]), timeout=patience) for _ in range(200)]
for rank, client in enumerate(clients):
    client.set(str(rank), "here")
print(clients[0].get("199"))
"""


def test_store_serves_more_ranks_than_a_process_may_have_files_by_default() -> None:
    """1,024 are usual, and every rank keeps a connection."""
    with subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE) as store:
        try:
            assert store.stdout is not None
            port = store.stdout.readline().strip()
            command = [sys.executable, "-c", CLIENTS, port]
            clients = subprocess.run(command, capture_output=True, text=True)
        finally:
            store.kill()
    assert clients.stdout == "b'here'\n", clients.stderr


@pytest.mark.slow
def test_template_learns_what_its_workers_had_to_import(cluster: None) -> None:
    """The first optimiser imports torch._dynamo, in every worker, unless the template has it."""

    def step() -> bool:
        had_it = "torch._dynamo" in sys.modules
        torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
        assert "torch._dynamo" in sys.modules
        return had_it

    launcher = trx.Launcher(workers_per_host=2, extra_env_vars={"OWN_AGENT_FOR": "learning"})
    launcher.run(os.getpid)
    template = launcher.run(os.getppid).rank(0)

    assert list(launcher.run(step)) == [False, False], "a launch that does not need it does not pay"
    assert list(launcher.run(step)) == [True, True]
    assert launcher.run(os.getppid).rank(0) == template


@pytest.mark.slow
def test_template_learns_from_a_run_that_failed(cluster: None) -> None:
    def fail() -> bool:
        had_it = "torch._dynamo" in sys.modules
        torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
        raise ValueError(had_it)

    launcher = trx.Launcher(workers_per_host=1, extra_env_vars={"OWN_AGENT_FOR": "failing"})
    seen: list[str] = []
    for _ in range(2):
        try:
            launcher.run(fail)
        except ValueError as error:
            seen.append(str(error))

    assert seen == ["False", "True"]


FAILS = "time.sleep(1)\n            raise ImportError('spoilt')"
HANGS = "time.sleep(1000)"


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", [FAILS, HANGS], ids=["fails", "hangs"])
def test_launch_after_an_import_that_went_wrong_has_another_template(
    cluster: None, spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began while the template still learnt, and then no worker could be forked."""
    (tmp_path / "spoils.py").write_text(f"""
import os, sys, time
from torchrunx_ray.worker import preload

preload._STUCK_S = 2.0
template = os.getpid()


class Spoils:
    def find_spec(self, name, path, target=None):
        if name == "torch._dynamo.config" and os.getpid() == template:
            {spoilt}


sys.meta_path.insert(0, Spoils())
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def step() -> int:
        torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
        return os.getppid()

    launcher = trx.Launcher(workers_per_host=1, preload=("torch", "spoils"))
    first, second = (launcher.run(step).rank(0) for _ in range(2))

    assert first != second


@pytest.mark.slow
def test_template_does_not_learn_where_the_function_says_how_to_import(cluster: None) -> None:
    """torch._dynamo reads such variables once."""

    def step() -> bool:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        import torch._dynamo.config

        return torch._dynamo.config.disable

    launcher = trx.Launcher(workers_per_host=1, extra_env_vars={"OWN_AGENT_FOR": "settings"})

    assert [launcher.run(step).rank(0) for _ in range(2)] == [True, True]


@pytest.mark.slow
def test_what_a_template_learns_leaves_the_environment_alone(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch._dynamo sets where compiled code is kept, which functions set by rank."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # an earlier test may have

    def step() -> tuple[bool, bool]:
        seen = "torch._dynamo" in sys.modules, "TORCHINDUCTOR_CACHE_DIR" in os.environ
        torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
        return seen

    launcher = trx.Launcher(workers_per_host=1, extra_env_vars={"OWN_AGENT_FOR": "variables"})
    _, was_set = launcher.run(step).rank(0)  # by whoever started Ray, perhaps

    assert launcher.run(step).rank(0) == (True, was_set)


@pytest.mark.slow
def test_template_does_not_learn_what_preload_left_out(cluster: None) -> None:
    def step() -> bool:
        had_it = "torch" in sys.modules
        import torch

        torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
        return had_it

    launcher = trx.Launcher(workers_per_host=1, backend=None, preload=())

    assert [launcher.run(step).rank(0) for _ in range(2)] == [False, False]


@pytest.mark.slow
def test_what_a_preloaded_module_has_in_a_buffer_is_not_written_by_workers(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has a copy of the buffer, and gc.freeze() makes theirs and the template's alike."""
    (tmp_path / "opens_a_file.py").write_text(
        "from pathlib import Path\n"
        "file = (Path(__file__).parent / 'log').open('w')\n"
        "file.write('opened')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    launcher = trx.Launcher(workers_per_host=2, backend=None, preload=("opens_a_file",), linger=0)
    launcher.run(gc.freeze)

    assert (tmp_path / "log").read_text() == ""
