"""cloudpickle with additions for large values and for references to values."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

from torchrunx_ray.wire.by_value import code_first, pickler_hooks
from torchrunx_ray.wire.values import tensors

_CloudPickler: Any = cloudpickle.Pickler

_SMALL = 2048
"""Size up to which a buffer stays in the stream. Each buffer out of band costs Ray and us some bookkeeping."""

Replace = Callable[[object], Any]
"""A function that returns the reduce tuple to pickle instead of an object, or NotImplemented to leave it as it is."""


Pickled = tuple[bytes, tuple[memoryview, ...], list[object]]
"""A stream, its out-of-band buffers, and the objects that keep the buffers valid."""


def dumps(value: object, replace: Replace | None = None) -> bytes:
    """Pickle a value into one stream."""
    file = io.BytesIO()
    _Pickler(file, None, [], replace).dump(value)
    return file.getvalue()


def dumps_with_buffers(value: object, replace: Replace | None = None) -> Pickled:
    """Pickle a value with large buffers out of band, without copying them.

    Annotations may refer from class to class, deeper than Python can recurse. Such a value is pickled without the
    globals that only its annotations need.
    """
    try:
        return _with_buffers(value, replace)
    except pickle.PicklingError as error:
        if not isinstance(error.__cause__, RecursionError):
            raise
    return _with_buffers(value, replace, with_annotations=False)


def _with_buffers(
    value: object, replace: Replace | None, *, with_annotations: bool = True
) -> Pickled:
    file = io.BytesIO()
    buffers: list[memoryview] = []
    owners: list[object] = []

    def keep_small(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes <= _SMALL:
            return True
        buffers.append(raw)
        return False

    _Pickler(file, keep_small, owners, replace, with_annotations=with_annotations).dump(value)
    return file.getvalue(), tuple(buffers), owners


class _Nowhere(io.BytesIO):
    """A file that discards the stream."""

    def write(self, data: Any, /) -> int:
        return len(data)


class _Pickler(_CloudPickler):
    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], bool] | None,
        owners: list[object],
        replace: Replace | None,
        *,
        with_annotations: bool = True,
    ) -> None:
        _CloudPickler.__init__(self, file, protocol=5, buffer_callback=buffer_callback)
        self._owners = owners
        self._replace = replace
        self._with_annotations = with_annotations
        self._order = code_first.Order()
        self._classes: dict[int, object] = {}
        self._trial: _Pickler | None = None

    def reducer_override(self, obj: object) -> Any:
        if issubclass(type(obj), type):
            self._classes[id(obj)] = obj
        reduced: Any = NotImplemented if self._replace is None else self._replace(obj)
        if reduced is NotImplemented:
            reduced = tensors.reduce(obj, self._owners)
        if reduced is NotImplemented:
            reduced = pickler_hooks.reduce(obj, self._order)
        if reduced is NotImplemented:
            reduced = _CloudPickler.reducer_override(self, obj)
            reduced = pickler_hooks.finish(obj, reduced, self._order, self._can_be_pickled)
        return reduced

    def _can_be_pickled(self, value: object) -> bool:
        """Return True if a trial pickles the value. A class that was pickled before, or in a trial, needs no trial.

        A trial covers the value's own code and data; objects that its annotations name have their own trials. All
        trials share a pickler, since it does not pickle an object again that it has already pickled.
        """
        if id(value) in self._classes or not self._with_annotations:
            return id(value) in self._classes
        trial = self._trial or self._new_trial()
        self._trial = None
        try:
            trial.dump(value)
        except Exception:  # its memo may now have parts that it did not finish, so drop it
            return False
        self._trial = trial
        self._classes |= trial._classes
        return True

    def _new_trial(self) -> "_Pickler":
        return _Pickler(_Nowhere(), lambda _: False, [], self._replace, with_annotations=False)
