"""Pickled values on their way between driver and workers."""

import contextlib
import functools
import pickle
import sys
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire.by_value import pickler_hooks
from torchrunx_ray.wire.values import pickling
from torchrunx_ray.wire.values.advice import advice_on, reason_of
from torchrunx_ray.wire.values.culprit import find_culprit, users_part

_keep_packed: ContextVar[bool] = ContextVar("_keep_packed", default=False)
_process_only_carries = False
_is_inserting: ContextVar[bool] = ContextVar("_is_inserting", default=False)
_inserted: ContextVar[Sequence[Callable[[], Any]]] = ContextVar("_inserted", default=())


@dataclass(slots=True, eq=False, repr=False)
class Packed:
    """A pickled value: its pickle stream, and its large buffers out of band.

    When a Packed is unpickled, it turns into the value, except in a process that only carries values
    (an agent, a Ray Client server) and inside `kept_packed()`.
    """

    stream: bytes | memoryview
    buffers: tuple[memoryview, ...] = ()
    owners: Sequence[object] = ()
    """Objects that keep the buffers valid."""

    def unpack(self, inserted: "Sequence[Packed]" = ()) -> Any:
        """Return the value, with the values `inserted` in place of each `Inserted`."""
        token = _inserted.set([functools.cache(packed.unpack) for packed in inserted])
        try:
            return pickler_hooks.loads(self.stream, self.buffers)
        finally:
            _inserted.reset(token)

    @property
    def parts(self) -> "list[memoryview]":
        return [memoryview(part).cast("B") for part in (self.stream, *self.buffers)]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return sum(part.nbytes for part in self.parts)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if protocol < 5:  # Ray Client may ask for less than out-of-band buffers need
            return _arrive, (bytes(self.stream), *map(bytes, self.buffers))
        return _arrive, tuple(pickle.PickleBuffer(part) for part in (self.stream, *self.buffers))


@dataclass(frozen=True)
class Inserted:
    """Placeholder for a value that is sent separately from the value that refers to it."""

    index: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _insert, (self.index,)


def pack(
    parts: Sequence[tuple[str, object]],
    *,
    rank: int | None = None,
    hostname: str | None = None,
    replace: pickling.Replace | None = None,
) -> Packed:
    """Pickle one value, or a tuple of several. Raise PayloadError with the part that cannot be pickled."""
    values = tuple(value for _name, value in parts)
    whole = values[0] if len(values) == 1 else values
    try:
        return Packed(*pickling.dumps_with_buffers(whole, replace))
    except Exception as error:
        failed = error
    culprit = find_culprit(parts, failed, replace)
    del failed  # its traceback refers to this frame
    raise PayloadError(
        path=culprit.path,
        reason=reason_of(culprit.error),
        rank=rank,
        hostname=hostname,
        advice=advice_on(culprit, is_returned=rank is not None),
    ) from users_part(culprit.error)


@contextlib.contextmanager
def kept_packed() -> Generator[None]:
    """Let each Packed that is unpickled inside the context stay a Packed."""
    token = _keep_packed.set(True)
    try:
        yield
    finally:
        _keep_packed.reset(token)


def carry_values_packed() -> None:
    """Declare that this process only carries values, and must not import the modules that they need."""
    global _process_only_carries
    _process_only_carries = True


def _arrive(stream: Any, *buffers: Any) -> Any:
    # Ray's buffers cannot be indexed; a memoryview of them can.
    packed = Packed(memoryview(stream), tuple(memoryview(buffer) for buffer in buffers))
    carries = _process_only_carries or "ray.util.client.server.server" in sys.modules
    return packed if carries or _keep_packed.get() else packed.unpack()


def is_inserting() -> bool:
    """Return True while an inserted value is being unpickled."""
    return _is_inserting.get()


def _insert(index: int) -> Any:
    token = _is_inserting.set(True)
    try:
        return _inserted.get()[index]()
    finally:
        _is_inserting.reset(token)
