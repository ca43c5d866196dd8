"""A thread that writes a run's output from a queue to its sinks."""

import contextvars
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torchrunx_ray.driver.background.warn_once import WarnOnce
from torchrunx_ray.driver.output.lines import LineCutter
from torchrunx_ray.driver.output.speaker import Sink, Speaker
from torchrunx_ray.wire.messages import Stream
from torchrunx_ray.wire.records import from_line


@dataclass(frozen=True)
class Said:
    """A piece of output, or a line about an event on a host if `stream` is None."""

    who: Speaker
    stream: Stream | None
    data: bytes
    time_s: float

    @property
    def size(self) -> int:
        """Size that counts towards the limit of waiting output; 0 for a line about an event on a host."""
        return 0 if self.stream is None else len(self.data)


@dataclass(frozen=True)
class Begun:
    """A mark in the output: what follows is of this attempt."""

    attempt: int
    size: int = 0


class Source:
    """The queue and the line cutters that the writers of one run share."""

    def __init__(self) -> None:
        self.said = queue.SimpleQueue[Said | Begun | None]()
        """The queue. None marks its end."""
        self.cutters = defaultdict[tuple[Speaker, Stream], LineCutter](LineCutter)


class Writer:
    """Writes each piece to one sink after the other, until the end, or until another writer replaces it."""

    def __init__(
        self,
        source: Source,
        sinks: Sequence[Sink],
        takes: Callable[[Sink], bool],
        was_written: Callable[[int], None],
        has_ended: Callable[[], None],
    ) -> None:
        """`takes` is called before each sink and record. A writer that gave way does not call `has_ended`."""
        self._source = source
        self._sinks = sinks
        self._takes = takes
        self._was_written = was_written
        self._has_ended = has_ended
        self._warn_once = WarnOnce(
            "The output of the workers cannot be shown here. The launch continues: %s"
        )
        self._lock = threading.Lock()
        self._in_hand: Said | Begun | None = None
        self._sink: Sink | None = None
        """The sink that is taking the piece now; None before the first sink."""
        self._gave_way = False
        context = contextvars.copy_context()  # a notebook uses the context to find a line's cell
        threading.Thread(
            target=context.run, args=(self._write_all,), name="torchrunx_ray output", daemon=True
        ).start()

    def give_way(self, first: Sink) -> Said | Begun | None:
        """Write nothing more, and return the piece that blocks in a sink after the first.

        Returns None, and the writer goes on, if the writer is not in such a sink.
        """
        with self._lock:
            if self._in_hand is None or self._sink is None or self._sink is first:
                return None
            self._gave_way = True
            return self._in_hand

    def _write_all(self) -> None:
        try:
            while (said := self._source.said.get()) is not None:
                self._sink, self._in_hand = None, said
                self._try(self._write, said)
                with self._lock:
                    if self._gave_way:
                        return
                    self._in_hand = None
                self._was_written(said.size)
            self._end_lines(list(self._source.cutters))
            for sink in self._sinks:
                self._try(sink.close)
        finally:
            if not self._gave_way:
                self._has_ended()

    def _end_lines(self, streams: "Sequence[tuple[Speaker, Stream]]") -> None:
        """End the lines of these streams that have not ended."""
        for who, stream in streams:
            if self._source.cutters[who, stream].is_in_line:
                self._try(self._write, Said(who, stream, b"\n", time.time()))

    def _write(self, said: Said | Begun) -> None:
        """Write to one sink after the other. The first sink has the whole piece before the next may block."""
        if isinstance(said, Begun):
            for sink in self._takers():
                self._try(sink.begin_attempt, said.attempt)
            return
        if said.stream is None:
            if said.who.rank is not None:  # another attempt begins in the worker's place
                cutters = self._source.cutters
                self._end_lines([each for each in cutters if each[0].place == said.who.place])
            for sink in self._takers():
                self._try(sink.host_line, said.who, said.data.decode(), said.time_s)
            return
        cut = self._source.cutters[said.who, said.stream].cut(said.data)
        if not cut.verbatim:
            return
        for sink in self._takers():
            if said.stream == "records":
                self._write_records(sink, said, cut.lines)
            else:
                stream = "stderr" if said.stream == "stacks" else said.stream
                self._try(sink.chunk, said.who, stream, cut, said.time_s)

    def _takers(self) -> Iterator[Sink]:
        for sink in self._sinks:
            if self._takes(sink):
                self._sink = sink
                yield sink

    def _write_records(self, sink: Sink, said: Said, lines: str) -> None:
        for line in lines.splitlines():
            if not self._takes(sink):
                return
            record = from_line(line)
            if record is None:
                self._try(sink.text, said.who, "stderr", line + "\n", said.time_s)
            else:
                self._try(sink.record, said.who, record)

    def _try(self, write: Callable[..., None], *args: object) -> None:
        """Call a sink, and report an error once. The run goes on even if the driver's stream cannot be written."""
        try:
            write(*args)
        except BaseException as error:  # including sys.exit in a handler
            self._warn_once.tell(error)
