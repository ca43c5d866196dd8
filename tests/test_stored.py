"""A run ends when Ray has the values, and says which hosts keep it from that."""

from pathlib import Path

import pytest
import ray

from tests.processes import wait_until
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.cluster.connection import Connection, untyped_ray
from torchrunx_ray.driver.report import stored


def test_host_whose_values_ray_does_not_get_is_named(
    cluster: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An agent that froze while Ray copied a large value kept its run from ending, without a word."""

    def value() -> None:
        assert wait_until((tmp_path / "gate").exists, 60)

    monkeypatch.setattr(stored, "_SILENT_S", 0.5)
    slow = untyped_ray.remote(num_cpus=0)(value).remote()
    values = [("here", [ray.put(1)]), ("there", [ray.put(2), slow])]
    waiting = loop.start(stored.until_stored("run-1", values, Connection()))
    assert wait_until(lambda: "run-1" in caplog.text, 30)
    assert "all values from: there. " in caplog.text
    assert not waiting.done()
    (tmp_path / "gate").touch()
    waiting.result(60)
