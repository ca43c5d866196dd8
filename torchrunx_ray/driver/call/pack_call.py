"""Packing of a function with its arguments into Ray's object store."""

import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from torchrunx_ray.driver.call import captures, references
from torchrunx_ray.driver.call.notebook_cells import Brought
from torchrunx_ray.driver.call.signature import check_call, check_function
from torchrunx_ray.driver.call.template_wanted import template_wanted
from torchrunx_ray.driver.cluster import connection, inventory
from torchrunx_ray.driver.cluster.connection import untyped_ray
from torchrunx_ray.driver.options.checks import check_handlers
from torchrunx_ray.driver.options.options import LogHandlers, Options
from torchrunx_ray.driver.output.to_files import ToFiles, default_files
from torchrunx_ray.errors import LaunchError, PayloadError, bytes_in_words
from torchrunx_ray.wire import versions
from torchrunx_ray.wire.messages import TemplateWanted
from torchrunx_ray.wire.values.payload import Packed, pack


@dataclass(frozen=True)
class Call:
    """The call of one run: a reference to the packed function, and a name for the run.

    `inserted` refer to the packed values of the ObjectRefs in the arguments. Ray keeps all these objects
    while this Call lives. `log_handlers` is the option's value, or what its function returned.
    `files`, `template` and `argv` are a snapshot of the driver at the time of submission.
    """

    run_name: str
    packed: Any
    inserted: Sequence[Any]
    log_handlers: LogHandlers
    files: ToFiles | None
    """The default files, if the option and the environment ask for them."""
    template: TemplateWanted
    argv: tuple[str, ...]


def put_call(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> Call:
    """Check and pickle a call, then put the call into Ray's object store.

    A call that cannot be pickled fails before any resource is requested.
    """
    check_function(func)
    check_call(func, args, kwargs)
    log_handlers = _made(options)
    template, argv = template_wanted(options), tuple(sys.argv)
    function_name = _name(func)
    found, brought = references.Found(), Brought()

    def replace(value: object) -> Any:
        brought.note(value)
        return found.replace(value)

    packed = pack(
        [
            (function_name, func),
            ("args", tuple(args)),
            ("kwargs", dict(kwargs)),
            ("the cells", brought),  # last, since pickling the others fills it
        ],
        replace=replace,
    )
    connection.connect()
    if packed.size >= captures.LARGE:
        captures.tell_of_large(function_name, func, found.replace)
    stored = _put(packed)
    inserted = found.packed(options.runtime_env)
    name = unique(options.name or function_name)
    files = default_files(name) if log_handlers == "auto" else None
    return Call(name, stored, inserted, log_handlers, files, template, argv)


def _made(options: Options) -> LogHandlers:
    given = options.log_handlers
    if not callable(given):
        return given
    made = given()
    check_handlers(made)
    return made


def _put(packed: Packed) -> Any:
    try:
        return untyped_ray.put(packed)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        here = inventory.context().get_node_id()
        (store,) = (n.store_size for n in inventory.live_nodes() if n.node_id == here)
        raise PayloadError(
            path="the function with its arguments",
            reason=f"they have {bytes_in_words(packed.size)}; the object store of the driver's node "
            f"has {bytes_in_words(store)}, and the disk that Ray falls back to is full",
            step="store",
        ) from error
    except ModuleNotFoundError as error:  # Ray's server for ray:// unpickles the value
        missing = versions.missing_package(str(error), versions.of_this_process())
        if missing is None:
            raise
        raise LaunchError(f"On the head of the Ray cluster: {missing}") from None


def unique(name: str) -> str:
    """Return a name that no other run or session of the cluster has."""
    return f"{name}-{uuid.uuid4().hex[:6]}"


def _name(func: Callable[..., Any]) -> str:
    inner = getattr(func, "func", func)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__)
