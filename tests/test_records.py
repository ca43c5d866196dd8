"""What a function logs arrives once, with its level and place, however the function configures logging."""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.logs import Kept


def test_records_keep_level_logger_place_and_exception(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        logging.getLogger("mine.own").info("loss %.1f", 0.25)
        try:
            raise ValueError("bad")
        except ValueError:
            logging.exception("it went wrong")
        logging.addLevelName(33, "ODD")
        logging.log(33, "odd")

    begun = time.time()
    (hostname,) = one.run(speak).hostnames

    first, second, third = kept.records
    assert (first.levelno, first.getMessage(), first.worker_logger) == (20, "loss 0.2", "mine.own")
    assert (first.filename, first.funcName) == ("test_records.py", "speak")
    assert begun <= first.created <= time.time()
    assert (first.hostname, first.local_rank, first.rank) == (hostname, 0, 0)
    assert first.name == f"torchrunx_ray.{hostname}.0"
    assert second.levelname == "ERROR"
    assert second.getMessage().startswith("it went wrong\nTraceback (most recent call last):\n")
    assert second.getMessage().endswith("ValueError: bad")
    assert (third.levelname, third.getMessage()) == ("ODD", "odd")


def test_functions_own_handlers_get_what_they_would_in_a_script(
    cluster: None, tmp_path: Path
) -> None:
    """The level of what the driver takes kept warnings from them."""

    def speak() -> None:
        logging.getLogger().addHandler(logging.FileHandler(tmp_path / "own"))
        logging.warning("grave")

    trx.Launcher(workers_per_host=1, backend=None, log_handlers=None).run(speak)
    assert (tmp_path / "own").read_text() == "grave\n"


def test_handler_of_a_preloaded_module_does_not_say_it_twice(
    one: trx.Launcher, kept: Kept, tmp_path: Path
) -> None:
    (tmp_path / "configures_logging.py").write_text("import logging; logging.basicConfig()\n")
    launcher = dataclasses.replace(
        one,
        preload=("configures_logging",),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    launcher.run(lambda: logging.getLogger("mine").warning("once"))

    assert kept.said == [("WARNING", "WARNING:mine:once")]


def test_function_may_log_to_stdout(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
        print("first")
        logging.info("second")
        print("third")

    one.run(speak)
    assert kept.said == [("INFO", "first"), ("INFO", "second"), ("INFO", "third")]


def configure_plainly() -> None:
    logging.basicConfig(level=logging.DEBUG, format="mine %(levelname)s %(message)s")


def configure_by_force() -> None:
    logging.basicConfig(level=logging.DEBUG, format="mine %(levelname)s %(message)s", force=True)


def configure_by_hand() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("mine %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)


@pytest.mark.parametrize("configure", [configure_plainly, configure_by_force, configure_by_hand])
def test_functions_own_configuration_holds_and_no_line_comes_twice(
    configure: Callable[[], None], one: trx.Launcher, kept: Kept
) -> None:
    def speak() -> None:
        configure()
        logging.getLogger("some").debug("fine")
        logging.warning("grave")

    one.run(speak)

    assert [text for _, text in kept.said] == ["mine DEBUG fine", "mine WARNING grave"]


def test_functions_own_file_is_written_and_records_come_too(
    one: trx.Launcher, kept: Kept, tmp_path: Path
) -> None:
    def speak() -> None:
        logging.basicConfig(filename=tmp_path / "own", level=logging.INFO)
        logging.info("to both")

    one.run(speak)

    assert (tmp_path / "own").read_text() == "INFO:root:to both\n"
    assert kept.said == [("INFO", "to both")]


def test_tee_of_the_functions_own_does_not_say_it_twice(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        class Tee:
            def __init__(self, stream: "Any") -> None:
                self.stream = stream

            def write(self, text: str) -> None:
                self.stream.write(text)

            def flush(self) -> None:
                self.stream.flush()

        sys.stderr = Tee(sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.info("once")

    one.run(speak)
    assert [text for _, text in kept.said] == ["once"]
