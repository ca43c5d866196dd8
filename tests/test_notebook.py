"""In a real Jupyter kernel."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

from tests.clusters.raylets import raylets
from tests.soon import soon

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def text_of(cell: Any, *kinds: str) -> str:
    """What a cell shows: of its streams, and of its value."""
    shown = ""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name in kinds:
            shown += output.text
        elif output.output_type == "execute_result" and "value" in kinds:
            shown += output.data["text/plain"]
    return shown


@pytest.mark.exhaustive
def test_example_notebook_shows_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook: Any = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    stored = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in stored)
    NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [text_of(cell, "stdout", "value") for cell in cells]
    assert shown[0] == ""
    assert shown[1] == "rank 0: slope 3.00\n"
    assert re.fullmatch(r"<LaunchResult of 2 ranks on \S+>", shown[2])
    assert float(shown[3]) == pytest.approx(3, abs=0.01)
    assert shown[4] == "[3.0, 3.0]"
    assert shown[5] == "{'loss': 0.0, 'slope': 3.0}"
    assert "'total': " in shown[6]
    assert [shown[7], shown[8], shown[9]] == ["", "0.3", ""]
    assert shown[10] == "2"
    assert re.fullmatch(r"ranks 0-1: idle \(\d+\.py:5\)\nTrue", shown[11])
    assert shown[12] == "BadBatch('number 17') on rank 1\n"
    assert shown[13] == str(sum(range(1_000_000)))
    assert shown[14] == ""
    for cell in cells:
        progress = re.findall(r"^\d\d:\d\d .*", text_of(cell, "stderr"), re.MULTILINE)
        assert len(progress) <= 3, progress


class Notebook:
    """A kernel, and what its cells show."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager, self._client = manager, client
        self.shown = ""
        """By the last cell, as far as it was heard."""

    def begin(self, code: str) -> None:
        self.shown = ""
        self._asked: str = self._client.execute(code)

    def run(self, code: str) -> str:
        self.begin(code)
        self.wait_for_end()
        return self.shown

    def wait_for(self, text: str) -> None:
        while text not in self.shown:
            self._hear()

    def wait_for_end(self) -> None:
        while self._hear() != "idle":
            pass

    def interrupt(self) -> None:
        self._manager.interrupt_kernel()

    def _hear(self) -> str | None:
        """What the next message says of whether the kernel is busy with the cell."""
        message: dict[str, Any] = self._client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != self._asked:
            return None
        content = message["content"]
        self.shown += content.get("text", "") + "\n".join(content.get("traceback", []))
        return content.get("execution_state")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Notebook]:
    manager, client = start_new_kernel(cwd=str(folder), env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        notebook = Notebook(manager, client)
        notebook.run("import os, time, ray, torchrunx_ray as trx")
        yield notebook
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture
def notebook(joined: None, tmp_path: Path) -> Iterator[Notebook]:
    with opened(tmp_path) as notebook:
        notebook.run(
            "ray.init(log_to_driver=False)\n"
            "launcher = trx.Launcher(workers_per_host=2, backend=None)\n"
            "def train(seconds):\n"
            "    print('at it', flush=True)\n"
            "    time.sleep(seconds)\n"
            "    return os.getppid()\n"
        )
        yield notebook


def test_session_of_several_cells_survives_an_interrupt(notebook: Notebook) -> None:
    notebook.run("session = launcher.session()")
    first = notebook.run("print('template', session.run(train, 0).rank(0))")
    notebook.begin("session.run(train, 1000)")
    notebook.wait_for("at it")
    with soon():
        notebook.interrupt()
        notebook.wait_for("KeyboardInterrupt")
    notebook.wait_for_end()
    second = notebook.run("print('template', session.run(train, 0).rank(0))")
    notebook.run("session.close()")

    assert re.findall(r"template \d+", first) == re.findall(r"template \d+", second)
    all_of_them = "ray.cluster_resources()['CPU']"
    wait = f"while ray.available_resources().get('CPU') != {all_of_them}: time.sleep(0.01)"
    assert notebook.run(f"{wait}\nprint('back')") == "back\n"


def test_traceback_shows_the_lines_of_cells(notebook: Notebook) -> None:
    """Workers have no file to read them from."""
    notebook.run("def check(number):\n    assert number < 3, 'too large'")
    notebook.run("def check_all():\n    check(int(os.environ['RANK']) + 3)")
    shown = notebook.run(
        "try: launcher.run(check_all)\nexcept AssertionError as error: print(error.__cause__)"
    )
    assert "    check(int(os.environ['RANK']) + 3)\n" in shown
    assert "    assert number < 3, 'too large'\n" in shown


def test_progress_is_a_line_for_each_long_phase(notebook: Notebook) -> None:
    notebook.run("launcher.run(train, 0)")
    said = notebook.run("launcher.run(train, 6)")

    line = r"\d\d:\d\d train-\w+: "
    assert re.fullmatch(rf"at it\n{line}running 2 workers\n{line}done\n", said)


def test_notebook_on_a_cluster_uses_all_of_its_nodes(tmp_path: Path) -> None:
    with raylets({"num_cpus": 2}, {"num_cpus": 2}) as cluster, opened(tmp_path) as notebook:
        notebook.run(f"ray.init({cluster.address!r}, log_to_driver=False)")
        notebook.run(
            "class Point:\n"
            "    def __init__(self, rank): self.rank = rank\n"
            "def place(): return Point(int(os.environ['RANK'])), ray.util.get_node_ip_address()\n"
        )
        notebook.run("result = trx.launch(place, hostnames=2, workers_per_host=2)")
        shown = notebook.run(
            "print(len(set(result.hostnames)), [point.rank for point, _ in result],"
            " all(type(point) is Point for point, _ in result))"
        )
        assert shown == "2 [0, 1, 2, 3] True\n"


def test_function_that_takes_a_huge_global_along_is_told_of(notebook: Notebook) -> None:
    notebook.run("import numpy\ntable = numpy.zeros(2**27, dtype=numpy.uint8)")
    notebook.run("def use(): return len(table)")

    said = notebook.run("print(launcher.run(use).rank(0))")
    assert "global 'table' used by use has 128 MiB" in said
    assert f"{2**27}\n" in said
