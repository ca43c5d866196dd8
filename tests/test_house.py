"""The public face, what it costs to import, and what its types promise."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.scripts import types_in


def test_importing_the_package_loads_neither_ray_nor_torch() -> None:
    script = "import sys, torchrunx_ray; print(sorted({'ray', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


def test_rendezvous_that_torchrun_looks_for_does_not_load_ray() -> None:
    """Every torchrun of the environment loads it."""
    script = (
        "import sys; from importlib.metadata import entry_points\n"
        "(found,) = entry_points(group='torchrun.handlers', name='ray')\n"
        "print(found.load()().__name__, 'ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "RayRendezvous False\n"


def test_driver_does_not_load_torch() -> None:
    script = "import sys, torchrunx_ray; torchrunx_ray.launch; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "False\n"


def test_all_is_exactly_what_is_public() -> None:
    for name in trx.__all__:
        assert getattr(trx, name) is not None
    places = {
        "driver",
        "agent",
        "pulse",
        "worker",
        "wire",
        "integrations",
        "torchrunx",
        "elastic",
        "cli",
    }
    submodules = {*places, "errors", "version"}
    imports = {"import_module", "TYPE_CHECKING", "Any"}
    public = {name for name in dir(trx) if not name.startswith("_")}
    assert public - submodules - imports == {n for n in trx.__all__ if n != "__version__"}


def test_every_error_is_public() -> None:
    from torchrunx_ray import errors

    assert set(errors.__all__) < set(trx.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lunch'"):
        _ = trx.lunch  # pyright: ignore[reportAttributeAccessIssue]  # that is the test


def test_version_is_the_packages() -> None:
    assert trx.__version__ == version("torchrunx-ray")


def test_package_is_typed() -> None:
    assert (Path(trx.__file__).parent / "py.typed").exists()


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the line and the text of each docstring, also of those below an attribute."""
    folder = Path(trx.__file__).parent
    for path in folder.glob("**/*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        for part in (child for node in nodes for child in ast.iter_child_nodes(node)):
            match part:
                case ast.Expr(ast.Constant(str(text))):
                    yield f"{path.relative_to(folder)}:{part.lineno}", text.strip()
                case _:
                    pass


def test_docstrings_begin_with_a_verb_or_with_what_they_name() -> None:
    vague = {"Of", "What", "Those", "As", "Who", "Whether", "Where", "Its"}
    found = list(docstrings())

    assert len(found) > 500
    assert [where for where, text in found if text.split()[0].strip(",:") in vague] == []


def test_other_systems_are_told_what_they_can_do() -> None:
    script = """
import sys, ray, torchrunx_ray as trx
sys.platform = "darwin"
trx.launch(print)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "OSError: torchrunx_ray runs workers on Linux, and this is darwin" in done.stderr
    assert 'ray.init("ray://<head>:10001")' in done.stderr


TYPED = """
import torchrunx_ray as trx

def train(path: str, steps: int = 1) -> float: ...

reveal_type(trx.Launcher().run(train, "a"))
reveal_type(trx.Launcher().run(train, "a", steps=2).rank(0))
reveal_type(trx.Launcher().submit(train, "a").result())
reveal_type(trx.launch(train, ("a",)).results)
with trx.Launcher().session() as session:
    reveal_type(session.run(train, "a").rank(0))
trx.Launcher().run(train, 3)
trx.Launcher().run(train, "a", stepps=2)
trx.Launcher().submit(train)
trx.Launcher(workers_per_host="many")
"""


def test_types_follow_the_function(tmp_path: Path) -> None:
    types, wrong = types_in(TYPED, tmp_path)

    assert types == [
        '"LaunchResult[float]"',
        '"float"',
        '"LaunchResult[float]"',
        '"dict[str, list[float]]"',
        '"float"',
    ]
    assert wrong == [12, 13, 14, 15]
