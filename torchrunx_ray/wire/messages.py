"""The messages of a launch, grouped by sender and receiver.

If descriptors go with a message, its docstring lists them in their order.
"""

from dataclasses import dataclass
from typing import Literal

from torchrunx_ray.errors import OomKills
from torchrunx_ray.wire.ranks import Place
from torchrunx_ray.wire.values.transfer import Layout, Spans
from torchrunx_ray.wire.versions import Versions

Stream = Literal["stdout", "stderr", "stacks", "records"]
"""Streams of a worker: text, stacks that nobody asked for, or records of `logging` for `wire.records` as lines."""

StartMethod = Literal["fork", "spawn"]

END_OF_STACKS = b"\0"
"""End mark of a worker's answer to a request for its stacks."""


# driver -> agent


@dataclass(frozen=True)
class TemplateWanted:
    """Recipe of a template. An agent is reused for a run whose recipe is equal."""

    driver_variables: tuple[tuple[str, str], ...]
    explicit_variables: tuple[tuple[str, str], ...]
    env_file: str | None
    driver_executable: str
    driver_cwd: str
    one_worker: bool
    preload: tuple[str, ...]
    start_method: StartMethod


@dataclass(frozen=True)
class AttemptId:
    """One try at a run. Calls and events carry it, so those of an earlier attempt can be dropped."""

    run_id: str
    number: int


@dataclass(frozen=True)
class WorkerWanted:
    """Everything that the workers of one host have in common."""

    attempt: AttemptId
    hostname: str
    store: tuple[str, int]
    """Address of the store of the workers' group."""
    backend: str | None
    timeout: float
    argv: tuple[str, ...]
    log_level: int | None
    """Lowest level of records that some handler of the driver takes. None: `logging` is the function's own matter."""
    restarts: int
    """Number of restarts so far that count towards `max_restarts`."""
    max_restarts: int
    may_be_restarted: bool
    """True if another attempt may follow this one."""


@dataclass(frozen=True)
class Restarted:
    """The reason for an attempt that is not the first, and the number of hosts that were lost before it.

    One agent of the attempt counts these for Ray's metrics, since the driver may be outside of the cluster.
    """

    because: str
    hosts_lost: int


@dataclass(frozen=True)
class ShareWanted:
    """A host's share of an attempt."""

    worker: WorkerWanted
    places: tuple[Place, ...]
    own_variables: tuple[dict[str, str], ...]
    """Variables of each worker that replace those of its place; empty if there are none."""
    serves_store: bool
    """True if this host serves the store."""
    gpu_ids: tuple[str, ...]
    gpus_per_worker: float
    forks_when_told: bool
    """True if workers are forked only after all hosts can fork.

    Otherwise the first workers would wait for the others in the process group.
    """
    restarted: Restarted | None
    """Set only for the first host of an attempt that is not the first."""
    first_lease_s: float | None
    """Time from the agent's last claim for which the workers may live before a pulse grants more.

    None if they need no lease, because the run will not be started again.
    """
    blocked_after_s: float
    """Time that a worker may be blocked in the kernel; 0 if it may be as long as it likes."""


@dataclass(frozen=True)
class StacksWanted:
    """Request for the stacks of a run's workers that answer within `within_s`.

    After `thread_s` the agent asks faulthandler instead of a worker's thread, in case C code holds the GIL. It does not if
    no time is left.
    """

    within_s: float
    thread_s: float


# driver -> pulse


@dataclass(frozen=True)
class LeasesWanted:
    """Request to grant leases to the hosts of an attempt.

    `margin_s` is added to each lease before the driver takes it for over. `until_over_s` is the time until the leases
    that the hosts have from elsewhere must have run out: their first ones, or those of an earlier pulse.
    """

    attempt: AttemptId
    hosts: int
    lease_s: float
    margin_s: float
    until_over_s: float
    refused: tuple[int, ...]
    """Indices of hosts that get no leases, because they were revoked or have run out."""


# agent -> driver


@dataclass(frozen=True)
class Met:
    """State of an agent after it was claimed.

    `master_port` is set if the agent was asked to listen for the store's clients. `leaving` is True if the agent has
    begun to exit. `problem` is the reason why the agent cannot serve, or None.
    """

    ip: str
    master_port: int | None
    leaving: bool
    versions: Versions
    warning: str | None
    problem: str | None
    health_port: int | None
    """Port of the health checks, if the run wants them."""

    @property
    def health_address(self) -> str:
        ip = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"{ip}:{self.health_port}"


@dataclass(frozen=True)
class Printed:
    """Output of a worker, or of its template (`local_rank` None), to one of its streams.

    `data` may begin and end anywhere in a line.
    """

    local_rank: int | None
    stream: Stream
    data: bytes
    time_ns: int


@dataclass(frozen=True)
class TemplateLoaded:
    """The template of the run's workers is loaded, perhaps since an earlier run."""

    begun_ns: int
    loaded_ns: int


@dataclass(frozen=True)
class CanFork:
    """The template has finished its imports and holds the function and its arguments."""


@dataclass(frozen=True)
class WorkersForked:
    """The host has forked its workers; not all of them if it was told to stop meanwhile.

    One event has the pids of all workers, by local rank, since each event may cost the driver a poll.
    """

    pids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Exited:
    """A worker or the store (`local_rank` None) has ended and was reaped; `signal` is set if a signal killed it."""

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
    """None if the host does not show the counts, or if no SIGKILL ended the worker."""
    recorded: str = ""
    """Content of the worker's error file."""
    was_replaced: bool = False
    """True if a program had taken the worker's place."""


BLOCKED = "uninterruptible sleep"
"""Beginning of the scope's name for a worker that stays blocked in the kernel."""


@dataclass(frozen=True)
class ScopeExpired:
    """A process of a worker has not left a scope of torch's `expires` in time, and was sent the scope's signal.

    Without a signal (0), the worker goes on, and has not failed.
    """

    local_rank: int
    pid: int
    """Pid of the worker."""
    in_pid: int
    """Pid of the process that entered the scope: the worker, or a process that the worker started."""
    time_ns: int
    scope: str
    seconds: float
    """Time that the scope allowed."""
    signal: int
    stacks: str
    """Stacks of the worker at the deadline; empty if it did not answer."""
    last_lines: tuple[str, ...]
    recorded: str


@dataclass(frozen=True)
class AgentFailed:
    """The host cannot continue: for example, its template, its store or its raylet is gone."""

    time_ns: int
    what: str
    evidence: str
    is_ending: bool = False
    """True if the agent exits a moment later."""


@dataclass(frozen=True)
class Finished:
    """The function returned, and the agent holds its value."""

    local_rank: int
    time_ns: int
    size: int
    """Bytes of the value."""
    has_seen_stop: bool
    """True if the function has read a `stop_asked` that was set."""


@dataclass(frozen=True)
class HostEnded:
    """Every worker of the run is gone. `left` has the pids that SIGKILL did not end."""

    left: tuple[int, ...]


@dataclass(frozen=True)
class OutputEnded:
    """All output of the workers has been sent. Follows HostEnded."""


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


@dataclass(frozen=True)
class Replaced:
    """A program takes the worker's place now. Its exit is the outcome: with 0, the worker has returned None."""


NOT_REPORTED = "torchrunx_ray: cannot report the outcome of the function to the agent"
"""Start of a worker's last line on stderr if it cannot use its channel."""


@dataclass(frozen=True)
class Returned:
    """The function returned. Descriptor: the worker's memory, or a file with the value."""

    pid: int
    time_ns: int
    value: Spans | Layout
    """Place of the value in the worker's memory, or in the file."""
    has_seen_stop: bool
    """True if the function has read a `stop_asked` that was set."""


@dataclass(frozen=True)
class Failed:
    """The function raised, or its return value cannot be pickled.

    `exception` is the pickled exception, which only the driver may load. If the exception cannot be pickled,
    `exception` is None, and `unraisable` describes the failure. `in_collective` is True if torch.distributed raised the
    exception or one that led to it, as when a peer is gone, and not because of wrong arguments.
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
    """The code that the function passed to `sys.exit`."""
    in_collective: bool
    last_lines: tuple[str, ...] = ()
    """The last lines of stderr; the agent adds them."""
    recorded: str = ""
    """Content of the worker's error file; the agent adds it."""


# agent -> worker


@dataclass(frozen=True)
class Taken:
    """The agent has the value, and the worker may exit."""


@dataclass(frozen=True)
class NotReadable:
    """The agent cannot read the worker's memory, and asks for a file."""


# agent -> template


@dataclass(frozen=True)
class TemplateSetup:
    """First message to a template, before it imports anything heavy."""

    sys_path: tuple[str, ...]
    python_path: str | None
    """PYTHONPATH for processes that the function starts. The keeper was started with another one."""
    preload: tuple[str, ...]
    start_method: StartMethod


@dataclass(frozen=True)
class ForkStore:
    """Fork a process that serves a TCPStore. Descriptor: the listening socket."""

    attempt: AttemptId
    port: int


@dataclass(frozen=True)
class HoldCall:
    """Make room for the function and its arguments, which every forked worker gets."""

    layout: Layout


@dataclass(frozen=True)
class DropCall:
    """Free the function and its arguments: the last worker is forked."""


@dataclass(frozen=True)
class ForkWorker:
    """Fork one worker. Descriptors: channel to the agent, stdout, stderr, records, stacks, stop board."""

    worker: WorkerWanted
    place: Place
    variables: dict[str, str]
    default_variables: dict[str, str]
    """Variables to set if the user has not set them."""
    cuda_device: int | None


@dataclass(frozen=True)
class SignalWorkers:
    """Send a signal to the process groups of these workers, except those that have ended."""

    local_ranks: tuple[int, ...]
    signal: int


@dataclass(frozen=True)
class EndRun:
    """Kill all processes of the run that are left, its store and its strays included."""


# template -> agent


@dataclass(frozen=True)
class TemplateReady:
    """The template has finished its imports and can fork."""


@dataclass(frozen=True)
class TemplateRefused:
    """The template cannot be forked from."""

    problem: str
    advice: str
    evidence: str = ""


@dataclass(frozen=True)
class Learning:
    """The template imports what workers had to import. It forks again after that."""


@dataclass(frozen=True)
class Learned:
    """The import is over. If it went wrong, the template forks no more."""

    may_fork: bool


@dataclass(frozen=True)
class CallHeld:
    """Answer to HoldCall. Descriptor: the template's memory or the file, to write to."""

    pid: int
    address: int | None
    """Address in the template's memory; None for a file."""


@dataclass(frozen=True)
class Forked:
    """Answer to ForkStore and ForkWorker."""

    pid: int


@dataclass(frozen=True)
class ForkFailed:
    """Answer to ForkStore, ForkWorker and HoldCall if the host allows no more processes or memory.

    Also sent if forks are not safe any more after an import of the template.
    """

    reason: str


@dataclass(frozen=True)
class RunEnded:
    """Answer to EndRun: no process of the run is left, except the pids in `left`, which SIGKILL did not end."""

    left: tuple[int, ...]


Event = (
    Printed | TemplateLoaded | CanFork | WorkersForked | Joined | Started | Finished | Failed | Exited | Died
    | ScopeExpired | TemplateRefused | AgentFailed | HostEnded | OutputEnded
)  # fmt: skip
"""An event that an agent returns from `poll`."""


@dataclass(frozen=True)
class Told:
    """An event, and the attempt that it belongs to; None for output of the template between two attempts."""

    attempt: AttemptId | None
    event: Event
