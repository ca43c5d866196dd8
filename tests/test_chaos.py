"""A minute of random kills, from which a training recovers as if nothing had happened: `make chaos` for longer ones."""

import uuid
from pathlib import Path

import pytest

from tests.chaos.storm import SHAPES, storm
from tests.clusters.two_hosts import namespaces_are_possible
from tests.conftest import SHOWN_AT_END
from tests.traces import MARK


@pytest.mark.alone
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    not namespaces_are_possible(), reason="needs root and a kernel that gives namespaces"
)
@pytest.mark.parametrize(
    "shape",
    [
        "elastic",
        pytest.param("spares", marks=pytest.mark.exhaustive),
    ],
)
def test_disturbed_training_ends_with_the_parameters_of_an_undisturbed_one(
    shape: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    said: list[str] = []
    outcome = storm(11, 1, tmp_path, said.append, SHAPES[shape])
    pytestconfig.stash.setdefault(SHOWN_AT_END, []).extend(said)

    assert outcome.wrong == []
    assert len(outcome.effects) > 10
