"""The messages of a launch, by who sends them to whom.

Descriptors that go with a message stand in its docstring, in their order.
"""

from dataclasses import dataclass
from typing import Literal

from torchrunx_ray.errors import OomKills
from torchrunx_ray.wire.ranks import Place
from torchrunx_ray.wire.values.transfer import Layout, Spans
from torchrunx_ray.wire.versions import Versions

Stream = Literal["stdout", "stderr", "records"]
"""Streams of a worker: text, or `logging` as lines that `wire.records` reads."""

StartMethod = Literal["fork", "spawn"]

END_OF_STACKS = b"\0"
"""After what a worker answers to the byte by which it is asked for its stacks."""


# driver -> agent


@dataclass(frozen=True)
class TemplateWanted:
    """Recipe of a template. Agents are kept and reused if it is equal."""

    driver_variables: tuple[tuple[str, str], ...]
    explicit_variables: tuple[tuple[str, str], ...]
    env_file: str | None
    driver_executable: str
    driver_cwd: str
    one_worker: bool
    preload: tuple[str, ...]
    start_method: StartMethod


@dataclass(frozen=True)
class RunWanted:
    """One run's share of one host."""

    run_id: str
    hostname: str
    places: tuple[Place, ...]
    master_addr: str
    master_port: int
    backend: str | None
    timeout: float
    gpu_ids: tuple[str, ...]
    gpus_per_worker: float
    argv: tuple[str, ...]
    log_level: int
    forks_when_told: bool
    """Not before all hosts can fork, or those that can would wait for the others in the process group."""


@dataclass(frozen=True)
class StacksWanted:
    """The stacks of a run's workers, as far as these answer in time.

    After `thread_s` faulthandler is asked instead of a worker's own thread, in case C code holds the GIL.
    """

    within_s: float
    thread_s: float


# agent -> driver


@dataclass(frozen=True)
class Met:
    """Identity of an agent. `master_port` if it was asked to listen for the store's clients.

    `problem` says why it cannot serve, None where it can. `leaving`: it has begun to end itself.
    """

    ip: str
    master_port: int | None
    leaving: bool
    versions: Versions
    warning: str | None
    problem: str | None


@dataclass(frozen=True)
class Printed:
    """Output of a worker to one of its streams (None: its template to its own).

    Whole lines; only a line that is drawn anew after a carriage return comes as it is written.
    """

    local_rank: int | None
    stream: Stream
    data: bytes
    time_ns: int


@dataclass(frozen=True)
class TemplateLoaded:
    """The template of the run's workers is there; perhaps since an earlier run."""

    begun_ns: int
    loaded_ns: int


@dataclass(frozen=True)
class CanFork:
    """The template has imported, and holds the function and its arguments."""


@dataclass(frozen=True)
class Exited:
    """A worker is gone and has been reaped; `signal` when one killed it."""

    local_rank: int | None
    pid: int
    time_ns: int
    exit_code: int | None
    signal: int | None
    peak_memory: int


@dataclass(frozen=True)
class Died:
    """A worker exited without an outcome."""

    exited: Exited
    last_lines: tuple[str, ...]
    oom_kills: OomKills | None
    """None where the host does not show them, or no SIGKILL ended the worker."""


@dataclass(frozen=True)
class AgentFailed:
    """The host cannot go on: its template, its store or its raylet is gone."""

    time_ns: int
    what: str
    evidence: str
    is_ending: bool = False
    """The agent ends itself a moment later."""


@dataclass(frozen=True)
class Finished:
    """The function returned, and the agent holds its value."""

    local_rank: int
    time_ns: int
    size: int
    """Bytes of the value."""


@dataclass(frozen=True)
class HostEnded:
    """Every worker of the run is gone. `left` are pids that SIGKILL did not end."""

    left: tuple[int, ...]


@dataclass(frozen=True)
class OutputEnded:
    """After HostEnded: all that the workers wrote has been sent."""


# worker -> agent


@dataclass(frozen=True)
class Joined:
    """The worker is in the process group, if the run has one."""

    local_rank: int
    time_ns: int


@dataclass(frozen=True)
class Started:
    """The worker is about to call the function."""

    local_rank: int
    pid: int
    time_ns: int


NOT_REPORTED = "torchrunx_ray: the agent cannot be told what became of the function"
"""Begins what a worker says last on stderr where its channel is closed or otherwise useless."""


@dataclass(frozen=True)
class Returned:
    """The function returned. Descriptor: the worker's memory, or a file with the value."""

    pid: int
    time_ns: int
    value: Spans | Layout
    """Place of the value in the worker's memory, or in the file."""


@dataclass(frozen=True)
class Failed:
    """The function raised, or what it returned cannot travel.

    `exception` is its pickle, which only the driver may load; None where it cannot travel, and
    `unraisable` says why. `in_collective`: torch.distributed raised it or what led to it, as when a
    peer is gone, and not because of wrong arguments.
    """

    local_rank: int
    pid: int
    time_ns: int
    kind: str
    text: str
    traceback: str
    exception: bytes | None
    unraisable: str
    exit_code: int | None
    """That it asked for by `sys.exit`."""
    in_collective: bool
    last_lines: tuple[str, ...] = ()
    """The last lines of stderr; the agent adds them."""


# agent -> worker


@dataclass(frozen=True)
class Taken:
    """The agent has the value, and the worker may end."""


@dataclass(frozen=True)
class NotReadable:
    """The agent cannot read the worker's memory, and asks for a file."""


# agent -> template


@dataclass(frozen=True)
class TemplateSetup:
    """First message to a template, before it imports anything heavy."""

    sys_path: tuple[str, ...]
    python_path: str | None
    """The PYTHONPATH of whatever the function starts; the keeper was started with another."""
    preload: tuple[str, ...]
    start_method: StartMethod


@dataclass(frozen=True)
class ForkStore:
    """Serve a TCPStore. Descriptor: the listening socket."""

    run_id: str
    port: int


@dataclass(frozen=True)
class HoldCall:
    """Make room for the function and its arguments, which every worker is forked with."""

    layout: Layout


@dataclass(frozen=True)
class DropCall:
    """The last worker is forked."""


@dataclass(frozen=True)
class ForkWorker:
    """Become one worker. Descriptors: channel to the agent, stdout, stderr, records, stacks."""

    run_id: str
    place: Place
    hostname: str
    variables: dict[str, str]
    default_variables: dict[str, str]
    """Set where the user has not set them."""
    backend: str | None
    timeout: float
    cuda_device: int | None
    argv: tuple[str, ...]
    log_level: int
    """Level of the root logger, from which on somebody takes the records."""


@dataclass(frozen=True)
class SignalWorkers:
    """Send a signal to the groups of these workers, where they live."""

    local_ranks: tuple[int, ...]
    signal: int


@dataclass(frozen=True)
class EndRun:
    """Leave nothing of the run: kill what lives of it, its store and its strays."""


# template -> agent


@dataclass(frozen=True)
class TemplateReady:
    """The template has imported and can fork."""


@dataclass(frozen=True)
class TemplateRefused:
    """The template cannot be forked from."""

    problem: str
    advice: str
    evidence: str


@dataclass(frozen=True)
class CallHeld:
    """The answer to HoldCall. Descriptor: the template's memory, or the file, to write to."""

    pid: int
    address: int | None
    """In memory; None where it is a file."""


@dataclass(frozen=True)
class Forked:
    """The answer to ForkStore and ForkWorker."""

    pid: int


@dataclass(frozen=True)
class ForkFailed:
    """The other answer to these: the host gives no more processes or memory."""

    reason: str


@dataclass(frozen=True)
class RunEnded:
    """The answer to EndRun: nothing of the run lives, but pids that SIGKILL did not end."""

    left: tuple[int, ...]


Event = (
    Printed | TemplateLoaded | CanFork | Joined | Started | Finished | Failed | Exited | Died
    | TemplateRefused | AgentFailed | HostEnded | OutputEnded
)  # fmt: skip
"""A poll's answer, from an agent to the driver."""
