"""One run's output, from the agents to the destinations that the options name."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torchrunx_ray.driver.background.own_lines import driver_has_configured_logging
from torchrunx_ray.driver.options.options import LogHandlers, Options
from torchrunx_ray.driver.output import host_story
from torchrunx_ray.driver.output.handlers import Only
from torchrunx_ray.driver.output.speaker import Sink, Speaker
from torchrunx_ray.driver.output.to_console import ToConsole
from torchrunx_ray.driver.output.to_files import ToFiles
from torchrunx_ray.driver.output.to_handlers import ToHandlers
from torchrunx_ray.driver.output.to_loggers import ToLoggers
from torchrunx_ray.driver.output.writer import Begun, Said, Source, Writer
from torchrunx_ray.wire.messages import AttemptId, Stream

logger = logging.getLogger("torchrunx_ray")

Taking = Literal["everywhere", "files", "nowhere"]
"""Destinations of the output."""

_MOST_BYTES = 16 * 2**20
"""Limit of the output that waits for a slow terminal or handler. Above it agents are asked for no more."""


class RunLogs:
    """A run's output, written in a separate thread: a slow terminal blocks the workers, not the driver's loop."""

    def __init__(
        self,
        run_name: str,
        options: Options,
        handlers: LogHandlers,
        files: ToFiles | None,
        speakers: Sequence[Speaker],
        sink: Sink | None = None,
    ) -> None:
        """With `sink`, all output goes there as text, and the handlers get nothing."""
        self._run_name = run_name
        self._console_ranks = options.console_ranks
        self._speakers: Sequence[Speaker] = ()
        self._workers: Sequence[Speaker] = ()
        self._shows_many = False
        """True if the console shows several ranks of the attempt."""
        self._taken: set[Speaker] = set()
        """Speakers whose output the console or the driver's loggers take."""
        self._hosts: dict[str, Speaker] = {}
        """Hosts of the last attempt, by name."""
        self._ranks: dict[tuple[str, int | None], int | None] = {}
        """Last rank of each worker's file, by hostname and local rank."""
        self.expect(speakers)
        self._sinks: list[Sink] = []
        self._taking: Taking = "everywhere"
        self._files = files
        self._levels: list[int] = []
        self._takes_text_only = sink is not None
        if sink is None:
            self._open_sinks(options, handlers)
        else:
            self._sinks.append(sink)
        self._source = Source()
        self._waiting_bytes = 0
        self._steps = 0
        """A counter that grows while output is written or dropped."""
        self._is_ending = False
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._writer = self._new_writer()

    def expect(self, speakers: Sequence[Speaker]) -> None:
        """Note the sources of an attempt's output."""
        self._speakers = speakers
        self._workers = [who for who in speakers if who.rank is not None]
        first_template = {who for who in speakers if who.rank is None and who.is_first_host}
        shown = self._shown_ranks()
        self._shows_many = len(shown) > 1
        self._taken |= {*shown, *first_template}

    def begin_attempt(self, attempt: AttemptId) -> None:
        """Begin an attempt's story in the files of its hosts, and of workers that are started again."""
        now = time.time()
        hosts = {who.hostname: who for who in self._speakers if who.rank is None}
        for hostname, who in hosts.items():
            ranks = [
                each.rank
                for each in self._workers
                if each.hostname == hostname and each.rank is not None
            ]
            self.tell(who, host_story.begin(attempt, ranks, len(self._workers)), now)
        for hostname in self._hosts.keys() - hosts.keys():
            self.tell(self._hosts[hostname], host_story.left_out(attempt), now)
        self._hosts = hosts
        for who in self._workers:
            new_rank = None if self._ranks.get(who.place) == who.rank else who.rank
            self._ranks[who.place] = who.rank
            if attempt.number:
                self.tell(who, host_story.begin_again(attempt, new_rank), now)
        self._source.said.put(Begun(attempt.number))

    @property
    def level(self) -> int | None:
        """Lowest level of a worker's `logging` that some sink takes; None if all take text only."""
        return None if self._takes_text_only else min(self._levels, default=logging.CRITICAL)

    @property
    def directory(self) -> Path | None:
        """Directory of the default files, once something was written."""
        return None if self._files is None else self._files.directory

    @property
    def has_room(self) -> bool:
        return self._taking == "nowhere" or self._has_room.is_set()

    @property
    def is_at_work(self) -> bool:
        """Return True while queued output is not written yet."""
        return self._waiting_bytes > 0 and not self._done.is_set()

    async def until_room(self) -> None:
        await self._has_room.wait()

    def put(self, who: Speaker, stream: Stream, data: bytes, time_s: float) -> None:
        """Queue a piece of output. The queue is bounded only if callers check `has_room` first."""
        self._waiting_bytes += len(data)
        if self._waiting_bytes > _MOST_BYTES:
            self._has_room.clear()
        self._source.said.put(Said(who, stream, data, time_s))

    def tell(self, host: Speaker, line: str, time_s: float) -> None:
        """Queue a line about an event on a host."""
        self._source.said.put(Said(host, None, line.encode(errors="backslashreplace"), time_s))

    async def drain(self) -> None:
        """Wait until all queued output is written."""
        self._is_ending = True
        self._steps += 1
        self._source.said.put(None)
        await self._done.wait()

    def hurry(self, stuck_s: float) -> None:
        """Write only to the files from now on. A blocked terminal or handler delays this by `stuck_s` at most.

        Writes nothing more if there are no files, or if the files block as well.
        """
        if self._done.is_set():
            return
        if self._taking == "everywhere":
            self._taking = "files"
            if self._waiting_bytes:
                has_files = "" if self._files is None else "; it is still written to the log files"
                logger.warning(
                    "interrupted: the last output of the workers is not shown%s", has_files
                )
        self._loop.call_later(stuck_s, self._give_up_if_stuck, stuck_s, self._steps)

    def _give_up_if_stuck(self, stuck_s: float, steps: int) -> None:
        if self._done.is_set():
            return
        is_stuck = self._steps == steps and (self._waiting_bytes or self._is_ending)
        if is_stuck and not self._files_go_on():
            self._give_up()
        else:
            self._loop.call_later(stuck_s, self._give_up_if_stuck, stuck_s, self._steps)

    def _files_go_on(self) -> bool:
        """Start another thread for the files if the present one is blocked by a terminal or a handler."""
        in_hand = None if self._files is None else self._writer.give_way(self._files)
        if in_hand is None:
            return False
        try:
            self._writer = self._new_writer()
        except RuntimeError:  # no thread can be started
            return False
        self._was_written(in_hand.size)
        return True

    def _give_up(self) -> None:
        """Write nothing more. `drain` returns at once, even if a handler blocks."""
        if self._waiting_bytes and self._files is not None:
            logger.warning("interrupted: the log files do not have all of the workers' last output")
        self._taking = "nowhere"
        self._done.set()
        self._has_room.set()

    def _open_sinks(self, options: Options, handlers: LogHandlers) -> None:
        if handlers is None:
            return
        if not isinstance(handlers, str):
            self._tell_of_deaf(handlers)
            sink = ToHandlers(self._run_name, handlers, are_ours=callable(options.log_handlers))
            self._sinks.append(sink)
            self._levels.append(sink.level)
            return
        if self._files is not None:
            self._sinks.append(self._files)
            self._levels.append(self._files.level)
        shown = self._shown_ranks()
        wanted = self._console_ranks
        if wanted and not shown:
            logger.warning(
                "console_ranks=%r: this launch has only ranks 0 to %d, so no rank is shown",
                wanted,
                len(self._workers) - 1,
            )
        takes = self._taken.__contains__
        if driver_has_configured_logging():
            self._sinks.append(ToLoggers(self._run_name, takes))
        else:
            sink = ToConsole(self._run_name, takes, shows_many=lambda: self._shows_many)
            self._sinks.append(sink)
        self._levels += [who.record_level for who in self._taken]

    def _shown_ranks(self) -> Sequence[Speaker]:
        wanted = self._console_ranks
        if isinstance(wanted, str):
            return self._workers
        return [who for who in self._workers if who.rank in wanted]

    def _tell_of_deaf(self, handlers: Sequence[logging.Handler]) -> None:
        """Warn about handlers for a worker that is not in this launch."""
        missing = [
            str(wanted)
            for handler in handlers
            for wanted in handler.filters
            if isinstance(wanted, Only) and not any(map(wanted.takes, self._speakers))
        ]
        if missing:
            logger.warning(
                "log_handlers: %s is not in this launch, which has ranks 0 to %d on %s; its handler "
                "gets nothing",
                ", ".join(missing),
                len(self._workers) - 1,
                ", ".join(dict.fromkeys(who.hostname for who in self._workers)),
            )

    def _new_writer(self) -> Writer:
        return Writer(
            self._source,
            self._sinks,
            self._takes,
            functools.partial(self._tell_loop, self._was_written),
            functools.partial(self._tell_loop, self._done.set),
        )

    def _takes(self, sink: Sink) -> bool:
        return self._taking == "everywhere" or (self._taking == "files" and sink is self._files)

    def _was_written(self, size: int) -> None:
        self._steps += 1
        self._waiting_bytes -= size
        if self._waiting_bytes <= _MOST_BYTES:
            self._has_room.set()

    def _tell_loop(self, call: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the interpreter is exiting
            self._loop.call_soon_threadsafe(call, *args)
