"""Exceptions as bytes, and back as the same type."""

import pickle
from typing import Any

from torchrunx_ray.wire import pickling


def dump_exception(error: BaseException) -> bytes:
    """Pickle an exception so that it loads again here; raises what makes that impossible."""
    try:
        data = pickling.dumps(error)
        if type(pickle.loads(data)) is type(error):
            return data
    except Exception:
        pass  # most often a constructor that wants other arguments than those in `args`
    data = pickling.dumps(_ByParts(error))
    loaded = pickle.loads(data)
    if type(loaded) is not type(error):
        raise TypeError(f"it comes back as {type(loaded).__qualname__}")
    return data


def load_exception(data: bytes) -> BaseException:
    return pickle.loads(data)


class _ByParts:
    """Pickles as a call that makes the exception without its constructor."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (type(self._error), self._error.args, dict(self._error.__dict__))


def _make(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
