"""What the machine's process table says of our processes."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torchrunx_ray.wire.environment import MARK


def of_pool(mark: str) -> dict[int, str]:
    """Command lines of the living processes that carry this mark, by pid."""
    return mentioning(f"{MARK}={mark}")


def mentioning(text: str) -> dict[int, str]:
    """Command lines of the living processes that were started with this in their environment."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = command_line(int(entry.name))
            except OSError:
                continue
    return found


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Wait for what sends no event, such as the end of a process that is nobody's child here.

    A condition that takes long is looked at less often, or it would keep a core from what it waits for.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        begun = time.monotonic()
        if condition():
            return True
        ended = time.monotonic()
        if ended > deadline:
            return False
        time.sleep(min(max(0.01, 4 * (ended - begun)), 1))


def pids() -> list[int]:
    """Return those of all processes, in whatever namespace of networks."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def titled(title: str) -> set[int]:
    """Return the pids of the processes whose command line begins so."""
    found: set[int] = set()
    for pid in pids():
        try:
            if command_line(pid).startswith(title):
                found.add(pid)
        except OSError:
            continue
    return found


def kill_next(find: Callable[[], set[int]], known: set[int], timeout_s: float = 20) -> int | None:
    """Kill the first process that is found and not known. Return its pid, or None if none comes."""
    found = set[int]()

    def is_there() -> bool:
        found.update(find() - known)
        return bool(found)

    if not wait_until(is_there, timeout_s):
        return None
    victim = min(found)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    return victim


def own_mark() -> str:
    """In a worker: the mark of everything that its agent started."""
    return os.environ[MARK]


def above(worker: int) -> dict[str, int]:
    """The pids of what stands above a worker."""
    template = parent(worker)
    keeper = parent(template)
    outer_keeper = parent(keeper)
    return {
        "agent": parent(outer_keeper),
        "outer keeper": outer_keeper,
        "keeper": keeper,
        "template": template,
    }


def agent_pid() -> int:
    """In a worker: of its agent."""
    return above(os.getpid())["agent"]


def daemonise() -> None:
    """Start a process that leaves the worker's group, session and parent."""
    subprocess.run(["setsid", "sh", "-c", "sleep 1000 &"], check=True)


def note(path: Path, text: object) -> None:
    """Write a file that whoever waits for it finds whole."""
    unfinished = path.parent.with_name(f"{path.parent.name}.{path.name}.{os.getpid()}")
    unfinished.write_text(str(text))
    unfinished.rename(path)


@contextlib.contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Stop these processes, and let those go on that still live."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGCONT)
