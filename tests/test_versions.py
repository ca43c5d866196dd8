"""A host that cannot understand the driver is named, with both versions, before it is used."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import ray

import torchrunx_ray as trx
from tests.clusters.other_python import python_without
from tests.clusters.raylets import raylets
from tests.clusters.started import ray_start
from tests.processes import wait_until
from torchrunx_ray.wire import versions
from torchrunx_ray.wire.by_value import private

HERE = {"Python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "cloudpickle": "3.1.2"}


def launcher_on_host_with(package: str, version: str, folder: Path) -> trx.Launcher:
    """The agent finds this package's metadata first; a stand-in for another installation."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return trx.Launcher(
        workers_per_host=1, linger=0, runtime_env={"env_vars": {"PYTHONPATH": str(folder)}}
    )


def test_another_ray_is_an_error_with_both_versions(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(trx.LaunchError) as caught:
        launcher_on_host_with("ray", "2.0.1", tmp_path).run(os.getpid)

    assert f"ray is 2.0.1 there and {ray.__version__} in the driver" in str(caught.value)


@pytest.mark.slow
def test_another_torch_is_a_warning(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert launcher_on_host_with("torch", "2.0.1", tmp_path).run(lambda: 1).rank(0) == 1
    assert "torch is 2.0.1 there and 2." in caplog.text


def test_build_of_torch_makes_no_difference() -> None:
    assert versions.doubt_between(HERE, {**HERE, "torch": "2.13.0+cu130"}) is None
    assert versions.problem_between(HERE, {**HERE, "torch": "2.13.0+cu130"}) is None


def test_python_may_differ_in_its_last_number_only() -> None:
    assert versions.problem_between(HERE, {**HERE, "Python": "3.11.2"}) is None
    problem = versions.problem_between(HERE, {**HERE, "Python": "3.12.7"})
    assert (
        problem
        == "Python is 3.12.7 there and 3.11.7 in the driver; install the same minor version."
    )


def test_package_that_is_missing_is_named() -> None:
    problem = versions.problem_between(HERE, {**HERE, "torch": None})
    assert problem == "torch is not installed there; the driver has 2.13.0+cpu."


LACKS_A_NAME = """import cloudpickle
del cloudpickle.cloudpickle._find_imported_submodules
from torchrunx_ray.wire.values import payload
"""


def test_cloudpickle_without_a_private_name_that_is_needed_is_refused_at_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LACKS_A_NAME], capture_output=True, text=True, check=False
    )

    assert done.stderr.endswith(
        f"\nImportError: cloudpickle {metadata.version('cloudpickle')} does not have "
        "_find_imported_submodules, which torchrunx_ray needs; install cloudpickle>=3,<4 or a newer "
        "torchrunx-ray\n"
    )


def test_every_private_name_of_cloudpickle_that_is_used_is_looked_for_at_import() -> None:
    folder = Path(trx.__file__).parent
    sources = [path.read_text() for path in folder.glob("**/*.py")]
    used = {name for text in sources for name in re.findall(r'of_cloudpickle\["(\w+)"\]', text)}

    assert used == set(vars(private)["_NAMES"])
    assert sum(text.count("vars(cloudpickle") for text in sources) == 1


@contextlib.contextmanager
def host_without(package: str, folder: Path) -> Iterator[str]:
    """The node id of a raylet whose Python has all that this one has, but for a package."""
    python = python_without(package, folder)
    with (
        raylets({"num_cpus": 1}) as cluster,
        ray_start(f"--address={cluster.address}", "--num-cpus=3", python=python),
    ):
        assert wait_until(lambda: ray.cluster_resources().get("CPU") == 4, 30)
        yield next(n["NodeID"] for n in ray.nodes() if n["Resources"].get("CPU") == 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "package",
    [
        "torchrunx_ray",
        *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("cloudpickle", "torch")),
    ],
)
def test_host_that_lacks_a_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Ray takes the driver's folder along
    with host_without(package, tmp_path) as node_id:
        launcher = trx.Launcher(hostnames=[node_id], workers_per_host=1)
        with pytest.raises(trx.LaunchError) as caught:
            launcher.run(os.getpid)

    version = versions.of_this_process()[package.replace("_", "-")]
    text = str(caught.value)
    assert text.startswith(f"On {node_id}: {package.replace('_', '-')} is not installed")
    assert f"the driver has {version}" in text
