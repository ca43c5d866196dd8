"""A thread that takes a run's output from a queue and writes it to its places."""

import contextvars
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torchrunx_ray.driver.background.warn_once import WarnOnce
from torchrunx_ray.driver.output.lines import LineCutter
from torchrunx_ray.driver.output.speaker import Sink, Speaker
from torchrunx_ray.wire.messages import Stream
from torchrunx_ray.wire.records import from_line


@dataclass(frozen=True)
class Said:
    """A piece of output; without a stream, a line of a host's story."""

    who: Speaker
    stream: Stream | None
    data: bytes
    time_s: float

    @property
    def size(self) -> int:
        """The piece's share of the output that may wait, which a host's story is not."""
        return 0 if self.stream is None else len(self.data)


def _no_cutters() -> defaultdict[tuple[Speaker, Stream], LineCutter]:
    return defaultdict(LineCutter)


@dataclass
class Source:
    """Queue and cutters that the writers of one run share."""

    said: queue.SimpleQueue[Said | None] = field(default_factory=queue.SimpleQueue[Said | None])
    """None is the end."""
    cutters: defaultdict[tuple[Speaker, Stream], LineCutter] = field(default_factory=_no_cutters)


class Writer:
    """Writes each piece to one sink after the other, until the end, or until it gives way to another writer."""

    def __init__(
        self,
        source: Source,
        sinks: Sequence[Sink],
        takes: Callable[[Sink], bool],
        was_written: Callable[[int], None],
        has_ended: Callable[[], None],
    ) -> None:
        """`takes` is asked before each sink and record; `has_ended` is not called by a writer that gave way."""
        self._source = source
        self._sinks = sinks
        self._takes = takes
        self._was_written = was_written
        self._has_ended = has_ended
        self._warn_once = WarnOnce(
            "What the workers say cannot be shown here; the launch goes on: %s"
        )
        self._lock = threading.Lock()
        self._in_hand: Said | None = None
        self._sink: Sink | None = None
        """Takes the piece in hand just now; None before the first sink."""
        self._gave_way = False
        context = contextvars.copy_context()  # a notebook knows by it whose cell a line belongs to
        threading.Thread(
            target=context.run, args=(self._write_all,), name="torchrunx_ray output", daemon=True
        ).start()

    def give_way(self, first: Sink) -> Said | None:
        """Write nothing more, and return the piece that the first sink has and a later one does not take.

        None if the writer is not in a later sink; then it goes on.
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
            for sink in self._sinks:
                self._try(sink.close)
        finally:
            if not self._gave_way:
                self._has_ended()

    def _write(self, said: Said) -> None:
        """Write to one sink after the other: the first one has all of it before the next one may block."""
        if said.stream is None:
            for sink in self._takers():
                self._try(sink.host_line, said.who, said.data.decode(), said.time_s)
            return
        cutter = self._source.cutters[said.who, said.stream]
        text = cutter.decode(said.data)
        lines = cutter.cut(text)
        for sink in self._takers():
            if said.stream == "records":
                self._write_records(sink, said, lines)
            else:
                self._try(sink.chunk, said.who, said.stream, text, lines, cutter.drawn, said.time_s)

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
        """The run goes on where the driver's stream is closed, or an object that cannot write."""
        try:
            write(*args)
        except BaseException as error:  # a sys.exit in a handler, too
            self._warn_once.tell(error)
