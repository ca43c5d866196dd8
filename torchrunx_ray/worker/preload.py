"""Imports of a template before it forks, and the check that forking is still safe."""

import contextlib
import ctypes
import gc
import importlib
import mmap
import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from torchrunx_ray.wire import linux
from torchrunx_ray.worker.function import import_hook, open_files

_PROBE_TIMEOUT_S = 5.0

_LATE = "torch._dynamo"
"""A module that the first optimiser or DDP model imports, in 0.6 s. Few functions that do not train need it."""

_late_is_wanted = mmap.mmap(-1, 1)
"""A flag in memory that forked workers share with the template."""

_NOT_SETTINGS = ("TORCHELASTIC_", "TORCHINDUCTOR_CACHE_DIR")
"""Variables that the launch sets for each worker, and that the import of torch._dynamo sets."""

_settings_of_template: dict[str, str] = {}

_STUCK_S = 30.0
"""Longest time from one imported module to the next, once the template serves."""

_SPAWN = "Take the module out of preload, or pass start_method='spawn'."


class Refusal(Exception):
    """The template cannot be forked from. Its arguments are those of TemplateRefused."""


class _ImportStuck(BaseException):
    """An import takes too long. Modules that try optional imports do not catch it."""


def load(modules: Sequence[str]) -> None:
    """Import the modules. Raise Refusal if an import fails, or if forking is not safe afterwards.

    Imported objects are frozen out of garbage collection, which would otherwise write to, and so copy, memory
    that all workers share. Garbage collection is also off during the imports: they make nearly no garbage, and
    the search for it takes a fifth of their time.
    """
    _settings_of_template.update(_settings())
    gc.disable()
    try:
        for module in modules:
            _import(module)
        if len(os.listdir("/proc/self/task")) > 1 and not _fork_can_compute():
            raise Refusal(
                f"importing preload={tuple(modules)!r} started an OpenMP thread pool, and forked workers "
                "would hang in their first parallel operation.",
                _SPAWN,
            )
    finally:
        flush()
    _spare_workers_the_teardown()
    open_files.note_template()
    gc.freeze()
    gc.enable()


def flush() -> None:
    """Flush Python's and C's buffers, or every fork would print their contents again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass  # it was closed or replaced, or a signal handler of the function raised
    ctypes.CDLL(None).fflush(None)


def note_late_imports() -> None:
    """Let a worker tell the template as soon as it has imported a module that later workers will need, too.

    Say nothing if the function has changed settings that the module reads at its import. In the next run, the function
    would set them too late, after the import in the template.
    """

    def tell(_: ModuleType) -> None:
        if _settings() == _settings_of_template:
            _late_is_wanted[0] = 1

    if may_learn():
        import_hook.after_import(_LATE, tell)


def may_learn() -> bool:
    """Return True if each worker may have to import a module that the template could import for all of them."""
    return "torch" in sys.modules and _LATE not in sys.modules


def is_to_learn() -> bool:
    """Return True if a worker has imported such a module."""
    return bool(_late_is_wanted[0]) and may_learn()


def _settings() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("TORCH", "PYTORCH")) and not name.startswith(_NOT_SETTINGS)
    }


def learn(meanwhile: Callable[[], None]) -> None:
    """Import the module that workers imported themselves. Raise Refusal if forking is no longer safe.

    The import takes long, so `meanwhile` is called again and again during it. It is given up if it does not get from one
    module to the next in time, because nobody would hear how a worker ends. That cannot be done while it hangs in C.
    """
    if not is_to_learn():
        return
    variables = dict(os.environ)

    def between() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        meanwhile()
        signal.setitimer(signal.ITIMER_REAL, _STUCK_S)

    signal.signal(signal.SIGALRM, _give_up)
    try:
        with import_hook.between_imports(between):
            load([_LATE])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # The import sets some that a function may want to set.
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)


def _give_up(_signum: int, _frame: object) -> NoReturn:
    raise _ImportStuck(f"no further module within {_STUCK_S:g} s")


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except BaseException as error:
        raise Refusal(
            f"preload={module!r} cannot be imported: {type(error).__name__}: {error}.",
            "Is the module installed there, and spelled as in an import statement?",
            "" if isinstance(error, ModuleNotFoundError) else traceback.format_exc(),
        ) from error
    if _cuda_was_touched():
        raise Refusal(
            f"importing preload={module!r} initialised CUDA, which forked workers cannot use.",
            _SPAWN,
        )


def _spare_workers_the_teardown() -> None:
    """Keep workers from running the finalizers of imported modules when they exit.

    torch has 134 finalizers that deregister operators. They would cost each worker 20 ms and copies of shared
    memory.
    """
    for finalizer in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]  # no public name lists them
        finalizer.atexit = False


def _cuda_was_touched() -> bool:
    # torch.cuda.is_initialized() does not see that another library called cuInit.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            # cuInit opens this device. NVML opens other devices, after which a fork still works.
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/nvidia-uvm"):
                return True
    return False


def _fork_can_compute() -> bool:
    """Return True if a forked child completes one parallel operation of torch."""
    pid = os.fork()
    if pid == 0:
        _compute_and_exit()
    pidfd = linux.pidfd_open(pid)
    ended = linux.ready([pidfd], _PROBE_TIMEOUT_S)
    os.close(pidfd)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return status == 0


def _compute_and_exit() -> NoReturn:
    try:
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(max(2, torch.get_num_threads()))
            torch.ones(1 << 20).add_(1).sum()
    except BaseException:
        os._exit(1)
    os._exit(0)
