"""An elastic agent of torch whose workers run on hosts of a Ray cluster."""

# torch declares fields of its groups and specs as None or without types, and so its decorator.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportIncompatibleMethodOverride=false, reportUnnecessaryComparison=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIncompatibleVariableOverride=false

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.health_check_server import HealthCheckServer
from torch.distributed.elastic.metrics.api import prof
from torch.distributed.elastic.multiprocessing import LogsSpecs

from torchrunx_ray.driver.launcher import Launcher
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.to_destinations import Destinations
from torchrunx_ray.driver.running.crew import GroupPlan
from torchrunx_ray.driver.terminal.console import TextStream
from torchrunx_ray.elastic import reach, signals
from torchrunx_ray.elastic.failures import is_of_blocked_worker, process_failures
from torchrunx_ray.elastic.group_store import GroupStore
from torchrunx_ray.elastic.output import destinations_of
from torchrunx_ray.elastic.reach import GroupRun
from torchrunx_ray.elastic.rendezvous import RayRendezvous, serve_anew
from torchrunx_ray.elastic.run import Assembled, Failed, MustMove, Returned, Stopped, Work
from torchrunx_ray.wire import environment
from torchrunx_ray.wire.ranks import Part, Place, first_gpu

_LAUNCHER = Launcher(cpus_per_worker=0, extra_env_vars="all")
"""Workers get the whole environment, as from torch's agent, and as many as wanted fit on a host."""

_RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
_NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_BLOCKED_AFTER = "TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT"


class RayElasticAgent(SimpleElasticAgent):
    """Takes whatever torch's LocalElasticAgent takes, and runs in the driver.

    With the rendezvous `RayRendezvous`, or with `hosts`, one agent has all workers on all hosts. With any other
    rendezvous each agent has the workers of one host, its own, and several agents form one group.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        start_method: str = "spawn",  # noqa: ARG002  # `launcher` decides
        exit_barrier_timeout: float = 300,
        log_line_prefix_template: str | None = None,
        shutdown_timeout: int = 30,
        health_check_server: HealthCheckServer | None = None,
        uninterruptible_state_timeout: float | None = None,
        *,
        hosts: int | tuple[int, int] | Sequence[str] | None = None,
        workers_per_host: Sequence[int] | None = None,
        launcher: Options | None = None,
    ) -> None:
        """`launcher` has all other options of a launch. `workers_per_host` is for hosts that differ."""
        super().__init__(spec, exit_barrier_timeout, shutdown_timeout)
        self._logs_specs = logs_specs
        self._prefix_template = log_line_prefix_template
        self._health_check_server = health_check_server
        self._blocked_after_s = _blocked_after_s(uninterruptible_state_timeout)
        self._group_store = GroupStore()
        self._error_files: dict[int, str] = {}
        """Paths of the workers' error files in the driver, by index."""
        self._options = self._made_options(launcher or _LAUNCHER, hosts, workers_per_host)
        self._starts: dict[int, int] = {}
        """Number of starts that did not count as restarts, by the number of restarts before them."""
        self._run: GroupRun | None = None
        self._work: Work | None = None
        """The work of all attempts, which is sent once."""
        self._environment: Mapping[str, str] = {}
        """The environment when the run began, as far as workers get it."""
        self._assembled: Assembled | None = None
        self._places: Sequence[Place] = ()
        """Places of the workers of the current attempt."""
        if isinstance(spec.rdzv_handler, RayRendezvous):
            spec.rdzv_handler.bind(self)

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Run the worker group until it ends. Signal handlers are put back at the end."""
        reach.connect()  # before the handlers: Ray installs one of its own for SIGTERM
        with signals.raised():
            result: RunResult = super().run(role)
        return result

    def place(self) -> tuple[str, int]:
        """Wait until each host of the next attempt has an agent. Return the address of the workers' store."""
        spec = self._worker_group.spec
        if self._run is None:
            numa_options = getattr(spec, "numa_options", None)
            self._work = Work(spec.entrypoint, tuple(spec.args), sys.executable, numa_options)
            self._environment = self._travelling()
            self._run = reach.begin(self._options, self._work)
        self._assembled = assembled = self._run.assemble(
            self._restarts, until_warm=not isinstance(spec.rdzv_handler, RayRendezvous)
        )
        self._remaining_restarts = spec.max_restarts - assembled.restarts
        return assembled.store

    @property
    def hosts_waiting(self) -> int:
        """Number of hosts with which another attempt can begin, which counts as no restart."""
        return 0 if self._run is None else self._run.hosts_waiting

    def _get_alive_time(self) -> int:
        """Return the present time, for a health server that was started before the agent.

        The agent is alive while it can answer. `health_check_port` of `launcher` tells of the workers.
        """
        return int(time.time())

    @property
    def _restarts(self) -> int:
        """Number of restarts so far."""
        restarts: int = self._worker_group.spec.max_restarts - self._remaining_restarts
        return restarts

    @prof
    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        spec = worker_group.spec
        if not isinstance(spec.rdzv_handler, RayRendezvous):
            self.place()  # an agent joins the others once it can serve
            serve_anew(spec.rdzv_handler)
        super()._rendezvous(worker_group)
        assembled = self._assembled
        assert assembled is not None
        if worker_group.group_world_size == 1:
            address = assembled.store
        else:
            address = self._group_store.agree(worker_group, spec)
        is_program = isinstance(spec.entrypoint, str)
        # A program connects to the address that it is shown. In a function, torch finds the store all the same.
        worker_group.master_addr = address[0] if is_program else spec.master_addr or address[0]
        worker_group.master_port = address[1] if is_program else spec.master_port or address[1]

    @prof
    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Return the workers of all hosts of this agent."""
        assembled = self._assembled
        assert assembled is not None
        if group_world_size > 1:
            if len(assembled.hosts) > 1:
                raise ValueError(
                    f"this agent has {len(assembled.hosts)} hosts, and meets {group_world_size - 1} more agents: let one agent "
                    'have all hosts (rendezvous "ray"), or let each have one.'
                )
            if assembled.hosts[0].workers != spec.local_world_size:
                raise ValueError(
                    f"this agent's host has {assembled.hosts[0].workers} workers by `workers_per_host`, and the agents that it meets "
                    f"are told {spec.local_world_size} by the spec's local_world_size: set local_world_size, and leave out "
                    "`workers_per_host`."
                )
            workers: list[Worker] = super()._assign_worker_ranks(
                store, group_rank, group_world_size, spec
            )
            return workers
        places = assembled.places()
        size = len(places)
        return [Worker(place.local_rank, place.rank, place.rank, size, size) for place in places]

    @prof
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start all workers. Return their pids by index, each with its host if there are several."""
        assembled, run = self._assembled, self._run
        assert assembled is not None
        assert run is not None
        self._check_work(worker_group.spec)
        workers, hosts = worker_group.workers, assembled.hosts
        first, agents = workers[0], worker_group.group_world_size or 1
        part = Part(first.global_rank, first.world_size, len(hosts) if agents == 1 else agents)
        self._places = assembled.places(part)
        variables = self._variables(worker_group)
        destinations = self._destinations(worker_group, variables, part)
        store = self._group_store.address if agents > 1 else None
        plan = GroupPlan(part, store, variables, self._blocked_after_s)
        pids = run.start(plan, destinations)
        return {
            index: pids[place.rank]
            if len(hosts) == 1
            else f"{hosts[place.host_index].label}:{pids[place.rank]}"
            for index, place in enumerate(self._places)
            if place.rank in pids
        }

    @prof
    def _stop_workers(self, worker_group: WorkerGroup, is_restart: bool = False) -> None:  # noqa: ARG002
        if self._run is not None:
            self._run.stop()

    @prof
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        run, assembled = self._run, self._assembled
        assert run is not None
        assert assembled is not None
        match run.ended():
            case None:
                return RunResult(WorkerState.HEALTHY)
            case MustMove():
                # Only the rendezvous "ray" knows of this, and lets torch's loop start the workers again.
                if worker_group.spec.rdzv_handler.num_nodes_waiting() == 0:
                    self._restart_workers(worker_group)
                return RunResult(WorkerState.HEALTHY)
            case Returned(values):
                ranks = [worker.global_rank for worker in worker_group.workers]
                return RunResult(WorkerState.SUCCEEDED, dict(zip(ranks, values, strict=True)))
            case Failed(failures):
                if not failures.may_go_away:
                    raise failures.exception
                if is_of_blocked_worker(failures):
                    # As with torch's agent: the worker may hold a device of its host, and lives on.
                    self._remaining_restarts = 0
                pids = {worker.global_rank: _pid(worker) for worker in worker_group.workers}
                told = process_failures(
                    failures, assembled.hosts, self._places, pids, self._error_files
                )
                return RunResult(WorkerState.FAILED, failures=told)
            case Stopped():
                return RunResult(WorkerState.UNKNOWN)

    def _shutdown(
        self,
        death_sig: signal.Signals = signal.SIGTERM,
        timeout: int = 30,  # noqa: ARG002  # torch passes `shutdown_timeout`
    ) -> None:
        """End everything, and give the hosts back. Workers get the signal, and SIGKILL after `shutdown_timeout`."""
        server, self._health_check_server = self._health_check_server, None
        try:
            if self._run is not None:
                self._run.close(death_sig)
                self._run = None
        finally:
            try:
                self._group_store.close()
            finally:
                if server is not None:
                    server.stop()

    def _made_options(
        self,
        launcher: Options,
        hosts: int | tuple[int, int] | Sequence[str] | None,
        workers_per_host: Sequence[int] | None,
    ) -> Options:
        _check_left_to_agent(launcher)
        spec = self._worker_group.spec
        handler = spec.rdzv_handler
        changes: dict[str, Any] = {}
        is_ray = isinstance(handler, RayRendezvous)
        if hosts is not None:
            changes["hostnames"] = hosts
        elif launcher.hostnames == "auto":
            changes["hostnames"] = handler.hostnames if is_ray else ["localhost"]
        is_elsewhere = launcher.placement_timeout != Options.placement_timeout
        if is_ray and (seconds := handler.placement_timeout(is_elsewhere=is_elsewhere)) is not None:
            changes["placement_timeout"] = seconds
        return dataclasses.replace(
            launcher,
            **changes,
            workers_per_host=workers_per_host or spec.local_world_size,
            backend=None,
            max_restarts=spec.max_restarts,
            restart_if=None,
            shutdown_timeout=self._shutdown_timeout,
            log_handlers=None,
            progress=False,
            name=launcher.name or spec.get_entrypoint_name() or spec.role,
        )

    def _check_work(self, spec: WorkerSpec) -> None:
        """Raise ValueError if a subclass has changed the work: it was sent at the first rendezvous."""
        assert self._work is not None
        sent = self._work.entrypoint, *self._work.args
        now = spec.entrypoint, *spec.args
        if len(now) != len(sent) or not all(map(_is_same, now, sent)):
            raise ValueError(
                "spec.entrypoint or spec.args has changed since the first rendezvous, in which they were sent to the hosts "
                "for all attempts. Set them before run(), and pass what changes in a variable: os.environ in "
                "_start_workers reaches the workers."
            )

    def _travelling(self) -> dict[str, str]:
        """Return the variables of this process that workers get."""
        return environment.chosen(os.environ, self._options.variable_patterns())

    def _variables(self, worker_group: WorkerGroup) -> list[dict[str, str]]:
        """Return what torch's local agent sets, by index, and what has changed in the environment since the run began."""
        spec = worker_group.spec
        asked_for = self._options.explicit_variables().get(_NCCL_ERRORS)
        changed = dict(self._travelling().items() - self._environment.items())
        every = {
            "GROUP_RANK": worker_group.group_rank,
            "GROUP_WORLD_SIZE": worker_group.group_world_size,
            "ROLE_NAME": spec.role,
            "MASTER_ADDR": worker_group.master_addr,
            "MASTER_PORT": worker_group.master_port,
            _RESTART_COUNT: self._restarts,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": True,
            _NCCL_ERRORS: asked_for or os.environ.get(_NCCL_ERRORS, "1"),
        }
        found: list[dict[str, str]] = []
        for place, worker in zip(self._places, worker_group.workers, strict=True):
            own = {
                "RANK": worker.global_rank,
                "LOCAL_RANK": worker.local_rank,
                "ROLE_RANK": worker.role_rank,
                "WORLD_SIZE": worker.world_size,
                "ROLE_WORLD_SIZE": worker.role_world_size,
                "LOCAL_WORLD_SIZE": place.local_world_size,
            }
            if worker_group.group_world_size == 1:  # all hosts are this agent's
                own |= {"GROUP_RANK": place.host_index, "GROUP_WORLD_SIZE": place.hosts}
            if getattr(spec, "virtual_local_rank", False):
                own |= {"LOCAL_RANK": 0, "CUDA_VISIBLE_DEVICES": self._own_gpu(place)}
            found.append({name: str(value) for name, value in (changed | every | own).items()})
        return found

    def _own_gpu(self, place: Place) -> str:
        assert self._assembled is not None
        host = self._assembled.hosts[place.host_index]
        if not host.gpu_ids:
            return ""
        return host.gpu_ids[first_gpu(host.gpus_per_worker, place.local_rank)]

    def _destinations(
        self, worker_group: WorkerGroup, variables: Sequence[dict[str, str]], part: Part
    ) -> Destinations:
        """Let the LogsSpecs choose files for the workers' output. They lie where the agent runs."""
        spec = worker_group.spec
        # torch empties the folder of an attempt with the same number of restarts.
        self._starts[self._restarts] = again = self._starts.get(self._restarts, -1) + 1
        number = f"{self._restarts}.{again}" if again else str(self._restarts)
        shown = [{**each, _RESTART_COUNT: number} for each in variables]
        logs = self._logs_specs.reify(dict(enumerate(shown)))
        for own, each in zip(variables, shown, strict=True):
            # The error file's path is the driver's; each host has its own.
            added = each.keys() - {_RESTART_COUNT, "TORCHELASTIC_ERROR_FILE"}
            own.update({name: each[name] for name in added})
        self._error_files = logs.error_files
        template = self._prefix_template
        prefixes = {
            index: f"[{spec.role}{index}]:"
            if template is None
            else Template(template).safe_substitute(
                role_name=spec.role, rank=worker.global_rank, local_rank=worker.local_rank
            )
            for index, worker in enumerate(worker_group.workers)
        }
        filters: dict[TextStream, Sequence[str]] = {
            "stdout": getattr(spec, "duplicate_stdout_filters", None) or (),
            "stderr": getattr(spec, "duplicate_stderr_filters", None) or (),
        }
        return destinations_of(logs, prefixes, filters, part.first_rank)


_OF_AGENT = {
    "workers_per_host": "local_world_size of the spec, or workers_per_host of the agent, decides",
    "backend": "the function makes its process group itself",
    "max_restarts": "max_restarts of the spec decides",
    "restart_if": "torch's loop restarts after each failure",
    "shutdown_timeout": "shutdown_timeout of the agent decides",
    "log_handlers": "logs_specs decides",
    "progress": "an agent shows none",
}
"""Options of a launcher that an agent does not take, with the reason."""


def _check_left_to_agent(launcher: Options) -> None:
    """Raise ValueError for an option that would have no effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    for name, why in _OF_AGENT.items():
        if (value := getattr(launcher, name)) != defaults[name]:
            raise ValueError(f"launcher: {name}={value!r} has no effect under an agent: {why}")


def _blocked_after_s(explicit: float | None) -> float:
    """Return the time that a worker may be blocked in the kernel, from the argument or torch's variable; 0: any."""
    if explicit is not None:
        return max(0.0, explicit)
    try:
        return max(0.0, float(os.environ.get(_BLOCKED_AFTER, "0")))
    except ValueError:  # as torch takes it
        return 0.0


def _is_same(one: object, other: object) -> bool:
    """Return True for the same object, or equal words or numbers. Other objects may not be comparable."""
    return one is other or (isinstance(one, str | int | float) and one == other)


def _pid(worker: Worker) -> int:
    """Return the pid in a worker's id; 0 if the worker was not started."""
    _, _, pid = str(worker.id or 0).rpartition(":")
    return int(pid)
