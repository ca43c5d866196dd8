"""The driver's membership in a Ray cluster: its start, calls to Ray during it, and its loss."""

import asyncio
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError

from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.driver.background.loop import in_thread
from torchrunx_ray.driver.background.main_guard import refuse_if_the_script_is_only_imported
from torchrunx_ray.driver.cluster import head_address, leaving, token
from torchrunx_ray.errors import LaunchError

P = ParamSpec("P")
T = TypeVar("T")

untyped_ray: Any = ray
"""Ray as Any: most of its functions have no types, or incomplete ones."""

_LOOK_AROUND_S = 1.0
"""Interval at which a waiting driver checks that it still belongs to the cluster."""

_NEWS_S = 0.5
"""Interval at which a running launch looks for news of the cluster, for which Ray has no event."""

_NEWS_THROUGH_CLIENT_S = 2.0
"""The same through ray://, where a look takes tasks that the cluster has to run."""

_lost: set[object] = set()
"""Connections through ray:// that Ray has given up."""

_inherited: set[object] = set()
"""Connections that this process inherited by a fork, without their threads."""

_connecting = threading.Lock()

_came_through_client = False
"""True if this process's last launch reached its cluster through ray://."""

_joined_by_launch: object = None
"""The last connection that a launch made by ray.init()."""


class ClusterLeft(LaunchError):
    """The driver called ray.shutdown() while a run went on, or its ray:// connection was lost."""

    def __init__(self, *, through_client: bool) -> None:
        super().__init__(
            "the driver's ray:// connection to the Ray cluster ended before the run did. The script called "
            "ray.shutdown(), or the driver could not reach the head for longer than "
            "RAY_CLIENT_RECONNECT_GRACE_PERIOD (30 s)"
            if through_client
            else "the driver left the Ray cluster before the run ended: the script called ray.shutdown()"
        )


class Connection:
    """The driver's membership in the cluster at the time of construction.

    After the membership has ended Ray must not be called: Ray would start or join another cluster.
    """

    def __init__(self) -> None:
        if not untyped_ray.is_initialized():
            raise ClusterLeft(through_client=False)
        self._through_client = is_remote_client()
        self._membership = _membership()

    async def ask(self, method: Any, *args: Any) -> Any:
        """Call an actor's method or a remote function, and return its result.

        Ray gives no more answers once the driver has called ray.shutdown().
        """
        self.check()
        return await self._answer(
            self._ask_head(method, *args) if self._through_client else method.remote(*args)
        )

    def tell(self, method: Any, *args: Any) -> None:
        """Call an actor's method without waiting for an answer.

        Does not report a lost cluster; the next `ask` or `call` does.
        """
        if self.is_ours():
            with contextlib.suppress(ClusterLeft), self._telling_its_loss():
                method.remote(*args)

    @property
    def is_inherited(self) -> bool:
        """True in a process that was forked from the one that connected."""
        return self._membership in _inherited

    def check(self) -> None:
        if not self.is_ours():
            leaving.wait_until_over()
            if self._through_client:
                _lost.add(
                    self._membership
                )  # Ray may not know of the loss yet, when the next launch asks
            raise ClusterLeft(through_client=self._through_client)

    def is_ours(self) -> bool:
        try:
            if leaving.has_begun() or not untyped_ray.is_initialized():
                return False
            membership = _membership()
        except (RayError, RuntimeError, AttributeError):
            return False  # another thread is shutting Ray down at this moment
        return self._membership == membership and membership not in _lost | _inherited

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call one of Ray's blocking functions in a thread, and return its result."""
        self.check()

        def work() -> T:
            with leaving.calling():
                self.check()
                try:
                    return function(*args, **kwargs)
                finally:
                    leaving.wait_until_over()  # before the function's references are freed

        with self._telling_its_loss():
            return await self._answer(in_thread(work))

    async def begin(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that calls actors without waiting for their answers, and return its result."""
        if self._through_client:  # each call through ray:// waits until the head accepts it
            return await self.call(function, *args, **kwargs)
        self.check()
        return function(*args, **kwargs)

    def inside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function inside the cluster. Through ray:// this is a task on some node."""
        self.check()
        if not self._through_client:
            return function(*args, **kwargs)
        with self._telling_its_loss():
            task = _task(function, self._membership)
            return untyped_ray.get(task.remote(*args, **kwargs))

    async def _answer(self, question: Awaitable[T]) -> T:
        """Await an answer while the driver belongs to the cluster. Ray may give no answer after that."""
        answer = asyncio.ensure_future(question)
        del question
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=_LOOK_AROUND_S)
                if not answer.done():
                    self.check()
            return answer.result()
        except RayError:
            self.check()  # ray.shutdown() also ends the actors that were called
            raise
        finally:
            leaving.wait_until_over()  # before Ray's reference is freed
            answer.cancel()
            del answer  # an exception refers to this frame, and must not wait for Python's gc

    async def _ask_head(self, method: Any, *args: Any) -> Any:
        """Call a method through ray:// in a thread: each call waits until the head accepts it.

        Ray's future is never cancelled: Ray's thread would fail when it sets the result.
        """
        with self._telling_its_loss():
            future = await in_thread(lambda: method.remote(*args).future())
            promised = asyncio.wrap_future(future)
            # Nobody retrieves the exception if the caller is cancelled.
            promised.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await asyncio.shield(promised)

    @contextlib.contextmanager
    def _telling_its_loss(self) -> Generator[None]:
        try:
            yield
        except RayError:
            raise
        except ConnectionError:
            if not self._through_client:
                raise
            _lost.add(self._membership)
            raise ClusterLeft(through_client=True) from None


def connect(options: Mapping[str, Any] | None = None) -> None:
    """Join the cluster that Ray finds, or start one on this machine. Does nothing if connected.

    `options` are for ray.init().

    Called in the user's thread: Ray installs signal handlers, which only the main thread may do.
    """
    global _came_through_client, _joined_by_launch
    refuse_if_the_script_is_only_imported()
    with _connecting:
        if not untyped_ray.is_initialized():
            by_itself = os.environ.get("RAY_ADDRESS", "").startswith("ray://")
            if _came_through_client and not by_itself:
                raise _no_longer_connected()
            _init(options or {})
            _joined_by_launch = _membership()
        elif not untyped_ray.util.client.ray.is_default():
            raise LaunchError(
                "ray.init(..., allow_multiple=True) connects only one thread, and launches run in another thread. "
                "Call ray.init without allow_multiple."
            )
        elif _membership() in _inherited:
            raise forked()
        elif _membership() in _lost:
            raise _no_longer_connected()
        _came_through_client = is_remote_client()


def is_of_parent() -> bool:
    """Return True if this process was forked from one that is connected to Ray, so that it cannot connect itself."""
    return bool(_inherited) and untyped_ray.is_initialized() and _membership() in _inherited


def parents_address() -> str:
    """Return the address of the cluster of the process that this one was forked from."""
    if is_remote_client():
        raise forked()
    address: str = untyped_ray.get_runtime_context().gcs_address
    return address


def forked() -> LaunchError:
    """Return the error of a launch in a forked child."""
    return LaunchError(
        f"this process (pid {os.getpid()}) was forked from a process that was already connected to Ray, and "
        "Ray's connection does not survive a fork. Launch in the process that called ray.init(), or start "
        "this process by multiprocessing's method 'spawn'."
    )


def _no_longer_connected() -> LaunchError:
    """Return the error of a lost ray:// connection.

    A launch does not call ray.init() here: that would start a Ray on the user's laptop, and launch there.
    """
    return LaunchError(
        "this process was connected to its Ray cluster through ray://, and the connection has ended. Connect again "
        'before the launch: ray.init("ray://<head>:10001"). If the connection was lost, call ray.shutdown() first.'
    )


def _init(options: Mapping[str, Any]) -> None:
    if sys.platform != "linux":
        raise OSError(
            f"torchrunx_ray runs workers on Linux, and this is {sys.platform}. From here you can "
            'drive a Linux cluster: call ray.init("ray://<head>:10001") before the launch.'
        )
    head_address.check(options.get("address"))
    try:
        untyped_ray.init(**options)
    except Exception as error:
        if (refused := token.refusal(error)) is not None:
            raise refused from None
        raise


def is_remote_client() -> bool:
    """Return True if this driver is connected through ray://, which offers less information."""
    return untyped_ray.util.client.ray.is_connected()


def news_interval_s() -> float:
    """Return the interval at which a running launch looks for nodes that join or drain."""
    return _NEWS_THROUGH_CLIENT_S if is_remote_client() else _NEWS_S


def was_begun_by_launch() -> bool:
    """Return True if a launch, and not the script, called ray.init() for this connection."""
    return untyped_ray.is_initialized() and _membership() == _joined_by_launch


def is_in_rays_worker() -> bool:
    """Return True if this process runs a Ray task or actor."""
    return untyped_ray._private.worker.global_worker.mode == untyped_ray.WORKER_MODE


def _membership() -> object:
    """Return an identity of the connection, which differs after every ray.init()."""
    if is_remote_client():
        # The worker's id would be a question to the head.
        return untyped_ray.util.client.ray.get_context().client_worker
    context = untyped_ray.get_runtime_context()
    # Every new cluster numbers its drivers from the start.
    return context.gcs_address, context.get_worker_id()


@functools.lru_cache(maxsize=16)
def _task(call: Callable[..., Any], _membership: object) -> Any:
    """Return a task for a function. One task per connection, since each task is sent to the cluster."""
    return untyped_ray.remote(num_cpus=0)(call)


def _note_inherited() -> None:
    # Through ray:// is_initialized may ask the head, which is impossible in a forked child.
    if is_remote_client() or untyped_ray.is_initialized():
        _inherited.add(_membership())


in_child(_note_inherited)
