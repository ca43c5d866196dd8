"""Files and console of the workers' output, laid out as torchrun's options say."""

import os
import shutil
import tempfile
from string import Template

from torchrunx_ray.cli.wanted import OutputWanted
from torchrunx_ray.driver.output.to_destinations import Destinations
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.terminal.console import TextStream
from torchrunx_ray.wire.ranks import Place

_STREAMS: tuple[TextStream, ...] = ("stdout", "stderr")


class OutputFiles:
    """One folder for each host, `<run id>_…`, with `attempt_<restarts>/<local rank>/stdout.log` and `stderr.log`.

    All folders lie on the machine of the command. There are none unless a file is asked for.
    """

    def __init__(self, wanted: OutputWanted, run_id: str, role: str) -> None:
        self._wanted = wanted
        self._run_id = run_id.replace(os.sep, "_")
        self._role = role
        self._folders: dict[str, str] = {}
        """The hosts' folders, by the name of the host."""
        self.root = wanted.directory if self._has_files else None
        """Folder of the hosts' folders; None if there are no files."""

    @property
    def _has_files(self) -> bool:
        wanted = self._wanted
        return (
            wanted.directory is not None
            or not wanted.redirected.is_empty
            or not wanted.teed.is_empty
        )

    def destinations(self, crew: Crew, restarts: int) -> Destinations:
        """Make the folders of an attempt. Return where the output of its workers goes."""
        attempt = {host.label: self._folder_of_attempt(host.label, restarts) for host in crew.hosts}
        files: dict[TextStream, dict[int, str]] = {stream: {} for stream in _STREAMS}
        tees: dict[TextStream, list[int]] = {stream: [] for stream in _STREAMS}
        filtered: dict[TextStream, dict[int, str]] = {stream: {} for stream in _STREAMS}
        for place in crew.places:
            folder = attempt[crew.hosts[place.host_index].label]
            for stream in _STREAMS:
                files[stream][place.rank] = self._file(folder, place, stream)
                filtered[stream][place.rank] = os.path.join(folder, f"filtered_{stream}.log")
                if self._is_teed(place, stream):
                    tees[stream].append(place.rank)
        prefixes = {place.rank: self._prefix(place) for place in crew.places}
        return Destinations(files, tees, prefixes, self._wanted.filters, filtered)

    def _folder_of_attempt(self, host: str, restarts: int) -> str:
        if not self._has_files:
            return ""
        if host not in self._folders:
            if self.root is None:
                self.root = tempfile.mkdtemp(prefix="torchelastic_")
            os.makedirs(self.root, exist_ok=True)
            self._folders[host] = tempfile.mkdtemp(prefix=f"{self._run_id}_", dir=self.root)
        folder = os.path.join(self._folders[host], f"attempt_{restarts}")
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not count
        os.makedirs(folder)
        return folder

    def _file(self, folder: str, place: Place, stream: TextStream) -> str:
        """Return the path of a worker's file; "" for the console."""
        has_file = any(
            streams.have(stream, place.local_rank)
            for streams in (self._wanted.redirected, self._wanted.teed)
        )
        if not has_file:
            return "" if self._is_shown(place) else os.devnull
        own = os.path.join(folder, str(place.local_rank))
        os.makedirs(own, exist_ok=True)
        return os.path.join(own, f"{stream}.log")

    def _is_teed(self, place: Place, stream: TextStream) -> bool:
        return self._is_shown(place) and self._wanted.teed.have(stream, place.local_rank)

    def _is_shown(self, place: Place) -> bool:
        shown = self._wanted.shown_local_ranks
        return shown is None or place.local_rank in shown

    def _prefix(self, place: Place) -> str:
        if self._wanted.prefix is None:
            return f"[{self._role}{place.local_rank}]:"
        return Template(self._wanted.prefix).safe_substitute(
            role_name=self._role, rank=place.rank, local_rank=place.local_rank
        )
