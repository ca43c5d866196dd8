"""The default files: one for each worker, and one for each host's template."""

import contextlib
import logging
import os
import re
import uuid
from datetime import datetime
from pathlib import Path

from torchrunx_ray.driver.background.warn_once import WarnOnce
from torchrunx_ray.driver.output.speaker import LEVELS, Sink, Speaker, TextStream
from torchrunx_ray.wire.records import WorkerRecord

logger = logging.getLogger("torchrunx_ray")

_DIRECTORY = "TORCHRUNX_LOG_DIR"
_LEVEL = "TORCHRUNX_LOG_LEVEL"
_LATEST = "latest"
_NOT_IN_NAMES = re.compile(r"[^\w.+-]")


class ToFiles(Sink):
    """A sink that writes lines with time and level to files in the run's own directory.

    Directory and files are created when there is something to write. No file stays open, since a driver
    may have thousands of workers. The first write error is reported, later ones are not.
    """

    def __init__(self, parent: str, run_name: str | None = None) -> None:
        """Without `run_name` the directory is named after the time only."""
        self.parent = Path(parent)
        self._run_name = run_name
        # The working directory may be deleted; a later write then reports the error.
        with contextlib.suppress(FileNotFoundError):
            self.parent = self.parent.absolute()
        self.level = _level()
        self.directory: Path | None = None
        self._warn_once = WarnOnce(
            "Some or all log files of this launch cannot be written: %s. The launch continues. Set "
            f'{_DIRECTORY} to a writable directory, or to "" for no log files.',
            tells_line=False,
        )

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:
        if LEVELS[stream] >= self._level_for(who):
            head = _head(time_s, logging.getLevelName(LEVELS[stream]))
            # One replace, since hundreds of thousands of lines per second pass here.
            self.append(who, head + lines[:-1].replace("\n", "\n" + head) + "\n")

    def record(self, who: Speaker, record: WorkerRecord) -> None:
        if record.least_level >= self._level_for(who):
            head = _head(record.created, record.level_name)
            self.append(who, f"{head}{text_with_logger(record)}\n")

    def host_line(self, who: Speaker, line: str, time_s: float) -> None:
        self.text(who, "stdout", f"{line}\n", time_s)

    def append(self, who: Speaker, text: str) -> None:
        """Append formatted, whole lines to the worker's file."""
        name = who.hostname if who.local_rank is None else f"{who.hostname}[{who.local_rank}]"
        try:
            if self.directory is None:
                self.directory = self._new_directory()
            with open(self.directory / f"{name}.log", "ab") as file:
                file.write(text.encode(errors="backslashreplace"))
        except OSError as error:
            self._warn_once.tell(error)

    def _new_directory(self) -> Path:
        if self._run_name is None:
            return new_directory(self.parent)
        directory = new_directory(self.parent, "_" + _NOT_IN_NAMES.sub("_", self._run_name)[:100])
        _lead_to(directory)
        return directory

    def _level_for(self, who: Speaker) -> int:
        return max(self.level, who.logger_level())


def default_files(run_name: str | None = None) -> ToFiles | None:
    """Return the files that the environment asks for; None if it asks for none."""
    parent = os.environ.get(_DIRECTORY, "torchrunx_logs")
    return ToFiles(parent, run_name) if parent else None


def text_with_logger(record: WorkerRecord) -> str:
    """Return the message with its logger's name, or unchanged if the function has set a format."""
    is_plain = record.is_configured or record.logger == "root"
    return record.text if is_plain else f"{record.logger}: {record.text}"


def _level() -> int:
    name = os.environ.get(_LEVEL, "") or "INFO"
    level = int(name) if name.isdigit() else logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        logger.warning("%s=%s is not a logging level such as DEBUG; using INFO", _LEVEL, name)
        return logging.INFO
    return level


def _head(time_s: float, level_name: str) -> str:
    return f"{datetime.fromtimestamp(time_s):%Y-%m-%d %H:%M:%S}:{level_name}: "


def new_directory(parent: Path, suffix: str = "") -> Path:
    """Create a directory named after the time. Launches in the same second get different directories."""
    parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now().replace(microsecond=0)
    for microsecond in range(1_000_000):
        directory = parent / f"{now.replace(microsecond=microsecond).isoformat()}{suffix}"
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise FileExistsError(f"{parent} already has a million directories for this second")


def _lead_to(directory: Path) -> None:
    """Point the link `latest` beside the directory to it, atomically: another launch may do the same."""
    link = directory.parent / f".{_LATEST}-{uuid.uuid4().hex}"
    try:
        link.symlink_to(directory.name)
        link.replace(directory.parent / _LATEST)
    except OSError:  # the file system has no links, or `latest` is a folder
        link.unlink(missing_ok=True)
