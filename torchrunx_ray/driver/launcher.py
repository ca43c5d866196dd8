"""The public API: `Launcher` and `launch`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypeVar

from torchrunx_ray.driver.call.pack_call import put_call
from torchrunx_ray.driver.options.checks import check_arguments, check_option_names
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.run import Run
from torchrunx_ray.driver.running.supervisor import run_once
from torchrunx_ray.driver.session import Session
from torchrunx_ray.driver.terminal.summary import follow
from torchrunx_ray.driver.tracebacks import short_traceback

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Launcher(Options):
    """Launches functions with these options. Only runs and sessions hold processes and resources."""

    def run(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> LaunchResult[R]:
        """Call the function on every worker, and wait for all workers.

        Raises the exception of the first failing worker, with its original type, or a LaunchError.
        In either case nothing of the launch is left running.
        """
        with short_traceback:
            return self.submit(func, *args, **kwargs).result()

    def submit(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Start a run in the background. Wait with the run's `result()`, or await the run."""
        with short_traceback:
            call = put_call(func, args, kwargs, self)
            progress = Progress(call.run_name, call.files)
            life = follow(lambda: run_once(self, call, progress), progress, self)
            return Run(life, progress, self.shutdown_timeout)

    def session(self) -> Session:
        """Reserve the hosts for several runs. Waits until the cluster has room.

        Inside an event loop this call does not wait. `async with` and the session's runs wait instead.
        """
        with short_traceback:
            return Session(self)


def launch(
    func: Callable[..., R],
    func_args: Sequence[Any] = (),
    func_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> LaunchResult[R]:
    """Call `func(*func_args, **func_kwargs)` on every worker, and wait for all workers.

    Takes the options of `Launcher`, and raises the same exceptions as `Launcher.run`.
    """
    with short_traceback:
        check_option_names(options, (field.name for field in fields(Options)), "launch()")
        check_arguments(func_args, func_kwargs)
        return Launcher(**options).run(func, *func_args, **(func_kwargs or {}))
