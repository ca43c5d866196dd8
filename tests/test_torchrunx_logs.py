"""The drop-in for torchrunx 0.4: loggers, files and handlers have its names and levels."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

import torchrunx_ray.torchrunx as torchrunx
from torchrunx_ray.torchrunx.utils.log_handling import (
    RedirectHandler,
    default_handlers,
    file_handlers,
    get_handler_filter,
)

SetLevel = Callable[[str, int], None]


class Kept(logging.Handler):
    """Keeps what it is given: name, level, text."""

    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.said: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.name, record.levelname, record.getMessage()))

    @property
    def texts(self) -> list[str]:
        return sorted(text for _, _, text in self.said)


@pytest.fixture
def launcher(cluster: None) -> torchrunx.Launcher:
    return torchrunx.Launcher(hostnames=["localhost"], workers_per_host=2, backend=None)


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What the logger of torchrunx, and those below it, are told."""
    kept = Kept()
    logging.getLogger("torchrunx").addHandler(kept)
    yield kept
    logging.getLogger("torchrunx").removeHandler(kept)


@pytest.fixture
def set_level() -> Iterator[SetLevel]:
    changed: set[str] = set()

    def set_level(name: str, level: int) -> None:
        changed.add(name)
        logging.getLogger(name).setLevel(level)

    yield set_level
    for name in changed:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def log_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path / "logs"))
    return tmp_path / "logs"


def speak() -> None:
    rank = os.environ["RANK"]
    print("out", rank)
    print("err", rank, file=sys.stderr)
    logging.warning(f"root {rank}")
    logging.getLogger("mine").debug(f"fine {rank}")


def test_first_workers_logger_gets_what_the_root_loggers_level_lets_through(
    launcher: torchrunx.Launcher, kept: Kept
) -> None:
    """As there: where nothing is set, that level is WARNING, and what is printed is INFO."""
    launcher.run(speak)

    assert sorted(kept.said) == [
        ("torchrunx.localhost.0", "ERROR", "err 0"),
        ("torchrunx.localhost.0", "WARNING", "root 0"),
    ]


@pytest.mark.slow
def test_loggers_of_all_hosts_and_workers_have_levels(
    launcher: torchrunx.Launcher, kept: Kept, set_level: SetLevel
) -> None:
    set_level("torchrunx", logging.DEBUG)
    launcher.run(speak)
    assert kept.texts == ["err 0", "mine:fine 0", "out 0", "root 0"]

    kept.said.clear()
    set_level("torchrunx.localhost", logging.INFO)
    launcher.run(speak)
    assert kept.texts == ["err 0", "out 0", "root 0"]

    kept.said.clear()
    set_level("torchrunx.localhost.0", logging.ERROR)
    launcher.run(speak)
    assert kept.texts == ["err 0"]


def test_files_have_everything_of_everybody_from_their_level_on(
    launcher: torchrunx.Launcher, log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.run(speak)
    monkeypatch.setenv("TORCHRUNX_LOG_LEVEL", "DEBUG")
    launcher.run(speak)

    at_info, at_debug = sorted(
        log_dir.iterdir(), key=lambda path: datetime.fromisoformat(path.name)
    )
    for directory, fine in ((at_info, []), (at_debug, ["DEBUG: mine:fine {}"])):
        agents, *names = sorted(path.name for path in directory.iterdir())
        assert agents == "localhost.log"
        assert names == ["localhost[0].log", "localhost[1].log"]
        assert "INFO: run speak-" in (directory / agents).read_text()
        for rank, name in enumerate(names):
            lines = [line[20:] for line in (directory / name).read_text().splitlines()]
            expected = [*fine, "ERROR: err {}", "INFO: out {}", "WARNING: root {}"]
            assert sorted(lines) == [text.format(rank) for text in expected]


@pytest.mark.slow
def test_agents_have_a_logger_and_a_file(
    launcher: torchrunx.Launcher, log_dir: Path, kept: Kept
) -> None:
    """Loggers hear nothing of what happens on the host; but Python in an agent may be made to speak."""
    launcher.extra_env_vars = {"PYTHONVERBOSE": "1"}
    launcher.run(os.getpid)

    by_agent = {level for name, level, _ in kept.said if name == "torchrunx.localhost"}
    assert by_agent == {"ERROR"}
    assert "import 'torch'" in "".join(path.read_text() for path in log_dir.glob("*/localhost.log"))


def test_handlers_of_a_factory_get_all_levels_through_their_filters(
    launcher: torchrunx.Launcher, kept: Kept, set_level: SetLevel, tmp_path: Path
) -> None:
    """The example of the documentation: one worker to a file, another one to its logger."""
    set_level("torchrunx", logging.DEBUG)

    def custom_handlers() -> list[logging.Handler]:
        redirect_handler = RedirectHandler()
        redirect_handler.addFilter(
            get_handler_filter(hostname="localhost", local_rank=1, log_level=logging.WARNING)
        )
        file_handler = logging.FileHandler(tmp_path / "output.txt")
        file_handler.addFilter(
            get_handler_filter(hostname="localhost", local_rank=0, log_level=logging.DEBUG)
        )
        return [redirect_handler, file_handler]

    assert launcher.set_logging_handlers(custom_handlers) is launcher
    launcher.run(speak)

    assert sorted(kept.said) == [
        ("torchrunx.localhost.1", "ERROR", "err 1"),
        ("torchrunx.localhost.1", "WARNING", "root 1"),
    ]
    lines = (tmp_path / "output.txt").read_text().splitlines()
    assert sorted(lines) == ["err 0", "mine:fine 0", "out 0", "root 0"]


def test_filter_for_an_agent_passes_no_worker(launcher: torchrunx.Launcher) -> None:
    of_agent, of_all = Kept(), Kept()
    of_agent.addFilter(get_handler_filter("localhost", None))

    launcher.set_logging_handlers(lambda: [of_agent, of_all]).run(speak)

    assert {name for name, _, _ in of_agent.said} == {"torchrunx.localhost"}
    assert not {"out 0", "err 0", "root 0", "mine:fine 0"} & set(of_agent.texts)
    assert "calls the function" in "".join(of_agent.texts)
    assert len(of_all.said) == 8
    assert not get_handler_filter("localhost", None)(logging.makeLogRecord({"name": "driver"}))


def test_handlers_see_the_same_names_in_every_run(launcher: torchrunx.Launcher) -> None:
    """A factory may return the same handlers again; a record passes all of them."""
    both = [Kept(), Kept(logging.ERROR)]
    launcher.set_logging_handlers(lambda: list(both))
    for _ in range(2):
        launcher.run(speak)

    all_of_it, errors = both
    assert all_of_it.texts.count("mine:fine 0") == 2
    assert {name for name, _, _ in all_of_it.said} == {
        "torchrunx.localhost.0",
        "torchrunx.localhost.1",
    }
    assert errors.texts == ["err 0", "err 0", "err 1", "err 1"]


def test_no_handlers_means_silence(
    launcher: torchrunx.Launcher, kept: Kept, log_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher.set_logging_handlers(None).run(speak)

    assert kept.said == []
    assert not log_dir.exists()
    assert "out 0" not in "".join(capfd.readouterr())


def test_auto_is_what_it_was(launcher: torchrunx.Launcher, kept: Kept) -> None:
    launcher.set_logging_handlers(None).set_logging_handlers("auto").run(speak)

    assert kept.texts == ["err 0", "root 0"]


def test_default_handlers_can_be_part_of_ones_own(
    launcher: torchrunx.Launcher, kept: Kept, log_dir: Path
) -> None:
    mine = Kept()

    launcher.set_logging_handlers(lambda: [mine, *default_handlers(["localhost"], [2])]).run(speak)

    assert len(mine.said) == 8
    assert kept.texts == ["err 0", "root 0"]
    (directory,) = log_dir.iterdir()
    lines = (directory / "localhost[1].log").read_text().splitlines()
    assert sorted(line[20:] for line in lines) == [
        "ERROR: err 1",
        "INFO: out 1",
        "WARNING: root 1",
    ]


def test_file_handlers_write_one_file_each(launcher: torchrunx.Launcher, tmp_path: Path) -> None:
    def handlers() -> list[logging.Handler]:
        made = file_handlers(["localhost"], [2], log_dir=tmp_path / "mine", log_level=logging.DEBUG)
        assert len(made) == 3
        return made

    launcher.set_logging_handlers(handlers).run(speak)

    (directory,) = (tmp_path / "mine").iterdir()
    assert datetime.fromisoformat(directory.name)
    assert "ended with exit code 0" in (directory / "localhost.log").read_text()
    for rank in range(2):
        assert f"DEBUG: mine:fine {rank}" in (directory / f"localhost[{rank}].log").read_text()


def test_libraries_levels_are_set_in_the_function(
    launcher: torchrunx.Launcher, kept: Kept, set_level: SetLevel
) -> None:
    set_level("torchrunx", logging.DEBUG)

    def distributed_function() -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        logging.getLogger("transformers").warning("of a library")
        logger = logging.getLogger("my_app")
        logger.info("Hello world!")

    launcher.run(distributed_function)

    assert kept.said == [("torchrunx.localhost.0", "INFO", "my_app:Hello world!")]


def test_format_of_the_functions_own_is_left_as_it_is(
    launcher: torchrunx.Launcher, kept: Kept, set_level: SetLevel
) -> None:
    set_level("torchrunx", logging.DEBUG)

    def configure_and_speak() -> None:
        logging.basicConfig(level=logging.INFO, format="%(name)s says %(message)s")
        logging.getLogger("my_app").info("hello")

    launcher.run(configure_and_speak)

    assert kept.texts == ["my_app says hello"]
