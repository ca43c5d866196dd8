"""The process that imports torch once per host and forks the workers.

After its imports, the template only forks, reaps, and reports the children that it reaped. When it is idle, it imports
what workers had to import themselves. It starts no threads, because a fork copies only the calling thread. It is a
subreaper, so a daemon that a worker started also ends with the run. When the agent is gone, the template kills all its
descendants and exits.
"""

import contextlib
import enum
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from torchrunx_ray.wire import linux, messages, process_tree
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.title import set_title
from torchrunx_ray.worker import preload, store
from torchrunx_ray.worker.entry import restore_python_path
from torchrunx_ray.worker.function.call import HeldCall
from torchrunx_ray.worker.process import become_worker


def main(channel: Channel) -> NoReturn:
    """Serve as the template until the agent closes the channel or dies."""
    process_tree.become_subreaper()
    faulthandler.enable(file=2)  # an import may crash
    try:
        setup, _ = channel.receive()
        assert isinstance(setup, messages.TemplateSetup)
        sys.path[:] = setup.sys_path
        restore_python_path(setup.python_path)
        if setup.start_method == "fork":
            preload.load(setup.preload)
        channel.send(messages.TemplateReady())
        _Template(channel, setup).serve()
    except preload.Refusal as refusal:
        channel.send(messages.TemplateRefused(*refusal.args))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the agent is gone
    finally:
        process_tree.kill_children()
    sys.stdout.flush()
    os._exit(0)


_IDLE_S = 0.5
"""Time without messages before the template imports what workers had to import, while a run goes on."""


class _State(enum.Enum):
    """States of a template after its first imports: OPEN, LEARNING, and then OPEN again, or SPENT for good."""

    OPEN = "forks"
    LEARNING = "imports what workers had to import, or is about to; a fork waits until this is over"
    SPENT = "forks no more, since an import went wrong; ends after its last child"


class _Sequel(enum.Enum):
    """Expectations of another attempt. A worker of a run makes it POSSIBLE, and one that fails LIKELY."""

    NONE = "the run ends with this attempt"
    POSSIBLE = "another attempt, if a worker fails"
    LIKELY = "another attempt, perhaps at once"


class _Template:
    def __init__(self, channel: Channel, setup: messages.TemplateSetup) -> None:
        self._channel = channel
        self._start_method: messages.StartMethod = setup.start_method
        self._state = _State.OPEN
        self._problem = ""
        """Reason why this template is spent."""
        self._waiting: tuple[object, list[int]] | None = None
        """A fork that was asked for during an import, and its descriptors."""
        self._sequel = _Sequel.NONE
        self._call: HeldCall | None = None
        self._children: dict[int, int | None] = {}
        """Local rank by pid; None for the store."""
        self._child_ended, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)

    def serve(self) -> None:
        while self._state is not _State.SPENT or self._children:
            if not self._serve_once(self._until_look_s()):
                self._begin_to_learn()
            if self._state is _State.LEARNING:
                self._learn()

    def _serve_once(self, timeout_s: float | None) -> bool:
        """Wait for messages and ended children, and handle them. Return False if there are none in time."""
        ready = linux.ready([self._channel.fileno(), self._child_ended], timeout_s)
        for fd in ready:
            if fd == self._child_ended:
                os.read(fd, 4096)
                self._reap()
            else:
                self._obey(*self._channel.receive())
        return bool(ready)

    def _until_look_s(self) -> float | None:
        """Return the time without messages after which this template may learn. None if there is nothing to learn."""
        is_followed = self._sequel is not _Sequel.NONE and self._children
        may_learn = preload.may_learn() if is_followed else preload.is_to_learn()
        return _IDLE_S if may_learn and self._state is _State.OPEN else None

    def _begin_to_learn(self) -> None:
        """Tell the agent of an import, if there is one to do. The agent then claims this template only after it."""
        if self._state is _State.OPEN and preload.is_to_learn():
            self._state = _State.LEARNING
            self._channel.send(messages.Learning())

    def _learn(self) -> None:
        """Import what workers had to import, and serve all the while, except forks.

        A worker that is forked in the middle of an import would have half of a module.
        """

        def serve() -> None:
            while self._waiting is None and self._serve_once(0):
                pass

        try:
            preload.learn(serve)
            self._state = _State.OPEN
        except preload.Refusal as refusal:
            self._state = _State.SPENT
            self._say_why(refusal)
        self._channel.send(messages.Learned(self._state is _State.OPEN))
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._obey(*waiting)

    def _say_why(self, refusal: preload.Refusal) -> None:
        self._problem = f"the template imported what workers had imported: {refusal.args[0]}"
        line = f"torchrunx_ray: no worker can be forked any more: {self._problem}\n"
        with contextlib.suppress(OSError):  # the agent is gone, which an import may have hidden
            os.write(2, line.encode(errors="backslashreplace"))

    def _obey(self, message: object, fds: list[int]) -> None:
        is_fork = isinstance(message, messages.ForkWorker | messages.ForkStore)
        if is_fork and self._state is _State.LEARNING:
            self._waiting = message, fds
            return
        match message:
            case messages.ForkWorker():
                self._fork_worker(message, fds)
            case messages.ForkStore():
                self._fork_store(message, fds)
            case messages.SignalWorkers():
                for pid, local_rank in self._children.items():
                    if local_rank in message.local_ranks:
                        process_tree.signal_group(pid, message.signal)
                        if os.getpgid(pid) != pid:  # the worker left its group
                            os.kill(pid, message.signal)
            case messages.HoldCall():
                self._hold_call(message)
            case messages.DropCall():
                self._drop_call()
            case messages.EndRun():
                self._drop_call()
                left = process_tree.kill_children(self._reap)
                # Learn now, unless another attempt of the run may follow at once.
                if self._sequel is not _Sequel.LIKELY:
                    self._begin_to_learn()
                self._sequel = _Sequel.NONE
                self._channel.send(messages.RunEnded(tuple(left)))
            case _:
                raise TypeError(f"a template does not know {message!r}")

    def _hold_call(self, wanted: messages.HoldCall) -> None:
        try:
            self._call = call = HeldCall(wanted.layout, self._start_method)
        except OSError as error:
            self._channel.send(_refused(error))
        else:
            self._channel.send(messages.CallHeld(os.getpid(), call.address), [call.fd])

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.drop()
            self._call = None

    def _fork_worker(self, wanted: messages.ForkWorker, fds: list[int]) -> None:
        assert self._call is not None
        call, template_pid = self._call, os.getpid()
        if wanted.worker.may_be_restarted and self._sequel is _Sequel.NONE:
            self._sequel = _Sequel.POSSIBLE

        def live() -> NoReturn:
            become_worker(wanted, fds, template_pid, call, self._start_method)

        self._fork(fds, wanted.place.local_rank, live)

    def _fork_store(self, wanted: messages.ForkStore, fds: list[int]) -> None:
        template_pid = os.getpid()

        def live() -> NoReturn:
            process_tree.die_with(template_pid)
            set_title("store", wanted.attempt.run_id)
            store.serve(fds[0], wanted.port)

        self._fork(fds, None, live)

    def _fork(self, fds: list[int], local_rank: int | None, live: Callable[[], NoReturn]) -> None:
        """Fork a child that does nothing but `live`, and tell the agent. The parent closes `fds`."""
        pid, answer = self._try_to_fork()
        if pid == 0:
            try:
                self._let_go()
                live()
            finally:  # a child must never run on as a second template
                traceback.print_exc()
                os._exit(1)
        for fd in fds:
            os.close(fd)
        self._channel.send(answer)
        if pid is None:
            return
        if local_rank is not None:
            # Parent and child both do this, so that no signal to the group can come too early.
            # PermissionError: the child has done so, and has since executed a fresh interpreter.
            with contextlib.suppress(PermissionError):
                os.setpgid(pid, pid)
        self._children[pid] = local_rank

    def _try_to_fork(self) -> tuple[int | None, messages.Forked | messages.ForkFailed]:
        if self._state is _State.SPENT:
            return None, messages.ForkFailed(self._problem)
        try:
            pid = os.fork()
        except OSError as error:
            return None, _refused(error)
        return pid, messages.Forked(pid)

    def _let_go(self) -> None:
        """Release what belongs to the template. Called in a new child."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._channel.close()
        os.close(self._child_ended)
        os.close(self._wakeup)

    def _reap(self) -> bool:
        return process_tree.reap_ended(self._child_has_ended)

    def _child_has_ended(self, pid: int, exit_code: int, peak_memory: int) -> None:
        if pid not in self._children:
            return  # an orphan that this subreaper inherited
        local_rank = self._children.pop(pid)
        if local_rank is not None:
            process_tree.signal_group(pid, signal.SIGKILL)
        if exit_code != 0 and self._sequel is _Sequel.POSSIBLE:
            self._sequel = _Sequel.LIKELY
        code, signum = (None, -exit_code) if exit_code < 0 else (exit_code, None)
        self._channel.send(messages.Exited(local_rank, pid, now_ns(), code, signum, peak_memory))


def _refused(error: OSError) -> messages.ForkFailed:
    return messages.ForkFailed(f"{error}; check the host's limits on processes and memory")
