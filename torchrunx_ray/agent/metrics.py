"""An agent's counters for Ray's metrics, which Prometheus reads from every node."""

from ray.util.metrics import Counter, Gauge

from torchrunx_ray.wire import messages

_FAILURES: dict[type[messages.Event], str] = {
    messages.Failed: "exception",
    messages.Died: "death",
    messages.ScopeExpired: "watchdog",
    messages.AgentFailed: "agent",
    messages.TemplateRefused: "preload",
}


class Metrics:
    """Metrics of one agent, from the events of its runs."""

    def __init__(self) -> None:
        self._runs = Counter("torchrunx_ray_runs", "Runs that began on this host.")
        self._failures = Counter(
            "torchrunx_ray_failures",
            "Failures by kind: exception, death, watchdog, agent or preload.",
            ("kind",),
        )
        self._restarts = Counter(
            "torchrunx_ray_restarts",
            "Restarts of runs whose first host is this one, by reason: exception, death, watchdog, agent, host, timeout, resize or drain.",
            ("reason",),
        )
        self._hosts_lost = Counter(
            "torchrunx_ray_hosts_lost", "Hosts that were lost before such a restart."
        )
        self._running = Gauge(
            "torchrunx_ray_workers_running", "Workers that are running their function."
        )
        self._seconds = Counter(
            "torchrunx_ray_seconds",
            "Seconds of this host's workers and template, by phase: template import, process group, run.",
            ("phase",),
        )
        self._run_id = ""
        self._began_ns = 0
        self._started_ns: dict[int, int] = {}
        self._is_stopping = False

    def begins(self, wanted: messages.ShareWanted, time_ns: int) -> None:
        """Note that an attempt of a run begins. A run counts once, however many attempts it has."""
        run_id = wanted.worker.attempt.run_id
        if run_id != self._run_id:
            self._runs.inc()
        self._run_id = run_id
        if (restarted := wanted.restarted) is not None:
            self._restarts.inc(tags={"reason": restarted.because})
            if restarted.hosts_lost:  # a counter refuses 0
                self._hosts_lost.inc(restarted.hosts_lost)
        self._began_ns = time_ns
        self._started_ns = {}
        self._running.set(0)
        self._is_stopping = False

    def stops(self) -> None:
        """Note that the agent signals the run's workers: a worker killed by these signals has not failed."""
        self._is_stopping = True

    def hear(self, event: messages.Event) -> None:
        kind = _FAILURES.get(type(event))
        if kind is not None and not self._is_no_failure(event):
            self._failures.inc(tags={"kind": kind})
        match event:
            case messages.TemplateLoaded() if event.loaded_ns > self._began_ns:
                self._took("template import", event.loaded_ns - event.begun_ns)
                self._began_ns = event.loaded_ns
            case messages.Started():
                self._took("process group", event.time_ns - self._began_ns)
                self._started_ns[event.local_rank] = event.time_ns
                self._running.set(len(self._started_ns))
            case messages.Finished() | messages.Failed():
                self._ends(event.local_rank, event.time_ns)
            case messages.ScopeExpired() if event.signal > 0:
                self._ends(event.local_rank, event.time_ns)
            case messages.Died() if event.exited.local_rank is not None:
                self._ends(event.exited.local_rank, event.exited.time_ns)
            case messages.HostEnded():
                self._running.set(0)
            case _:
                pass

    def _is_no_failure(self, event: messages.Event) -> bool:
        match event:
            case messages.Died():
                return self._is_stopping
            case messages.ScopeExpired():
                return event.signal <= 0
            case _:
                return False

    def _ends(self, local_rank: int, time_ns: int) -> None:
        started_ns = self._started_ns.pop(local_rank, None)
        if started_ns is not None:
            self._took("run", time_ns - started_ns)
            self._running.set(len(self._started_ns))

    def _took(self, phase: str, time_ns: int) -> None:
        if time_ns > 0:
            self._seconds.inc(time_ns / 1e9, tags={"phase": phase})
