"""Everything that a job's driver acts on, without Ray, HTTP or time.

The fakes keep the promises of the real ones, as far as the driver relies on them, and
count its acts, so that a driver can die before or after any of them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ray.checkpoint.directory import checkpoint_path
from megatron_ray.commands import Command, ProfileRequest
from megatron_ray.reports import ProfileReport, SpeedReport
from megatron_ray.storage.storage import LocalStorage
from workers.decisions.failures import FailureKind
from workers.decisions.faults.exclusions import BadNode
from workers.decisions.journal_entry import DeadRank
from workers.decisions.peers.copies import CopyFacts, CopySet, layout_of
from workers.decisions.placement import PlacementPlan, SlotFacts
from workers.decisions.ranks.diagnosis import Frame, GroupCounts, RankEvidence, Wait
from workers.decisions.ranks.stragglers import Pace
from workers.decisions.slot_assignment import WorkerToStart
from workers.driver.logs import JobLogs
from workers.driver.ports import JobPorts
from workers.driver.records.outbox import RecordLog
from workers.protocol.states import DesiredState, JobState, may_follow
from workers.protocol.wire import DesiredJob, NodeInfo, ProfileOrder, Record
from workers.rank.messages import Fence, NextReply, Poll, RankState, StartRequest
from workers.rank.spool import Line
from workers.ray.answers import WorkerGroupError
from workers.ray.deaths import Death
from workers.ray.worker_group import PollResult

JOB_ID = "job-f"
NODE = NodeInfo(node_id="node", address="127.0.0.1", cpus=4)
NOTICED_S = 60.0
"""Seconds until Ray notices that a node has died."""
PREPARED = {
    "train": [],
    "validation": [],
    "tokenizer_path": "t",
    "vocab_size": 256,
    "end_of_document": 0,
    "unigram_nats": 5.0,
}


class DriverDies(BaseException):
    """The driver's process is killed."""


class FaultInjector:
    """Counts the driver's acts and kills it at one of them; at 0 it never does."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.acts = 0

    def act(self) -> None:
        self.acts += 1
        if self.acts == self.at:
            raise DriverDies


class FakeClock:
    """A monotonic clock that only moves when a caller waits or a step is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeStorage(LocalStorage):
    """A folder written without waiting for a disk: only drivers die, not the machine."""

    def __init__(self, root: str, faults: FaultInjector) -> None:
        super().__init__(root)
        self._faults = faults

    def write_bytes_atomic(self, name: str, data: bytes) -> None:
        self._faults.act()
        path = Path(self.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._faults.act()


class FakeControlPlane:
    """Keeps records as the service does.

    It checks that numbers have no holes, follows the table of states, and admits the job
    at once.
    """

    def __init__(self, spec: dict[str, Any], job_dir: str) -> None:
        self.records: list[Record] = []
        self.steps: dict[int, int] = {}
        """Highest attempt that has reported each step."""
        self.unstored: dict[str, list[Record]] = {}
        """Ranks' records that have not come through, by source."""
        self.loses_reports = False
        """Ranks' reports do not come through."""
        self.state = JobState.PREPARING
        self.ignored: list[str] = []
        """State records that the table of transitions does not allow."""
        self.resumes = 0
        self.diagnosis_requests = 0
        self.profile: ProfileOrder | None = None
        self._revision = 1
        self._fields: dict[str, Any] = {
            "job_id": JOB_ID,
            "spec": spec,
            "job_dir": job_dir,
            "token": "t",
        }
        self.desired: DesiredJob | None = self._desired(DesiredState.PREPARE)

    def _desired(self, state: DesiredState) -> DesiredJob:
        return DesiredJob(
            desired=state,
            revision=self._revision,
            resumes=self.resumes,
            diagnosis_requests=self.diagnosis_requests,
            profile=self.profile,
            **self._fields,
        )

    def resize(self, dp: int) -> None:
        """Desires another data-parallel size."""
        spec = self._fields["spec"]
        self._fields["spec"] = {**spec, "parallel": {**spec["parallel"], "dp": dp}}
        self.desire(DesiredState.RUN)

    def desire(self, state: DesiredState) -> None:
        self._revision += 1
        self.desired = self._desired(state)

    def request_diagnosis(self) -> None:
        """Requests a diagnosis of the job, which is to run."""
        self.diagnosis_requests += 1
        self.desire(DesiredState.RUN)

    def request_profile(self, order: ProfileOrder) -> None:
        """Requests a profile of the job, which is to run."""
        self.profile = order
        self.desire(DesiredState.RUN)

    def _is_admitted(self) -> bool:
        return self.desired is None or self.desired.desired is not DesiredState.PAUSE

    def change(self, spec: dict[str, Any]) -> None:
        """Changes the spec of the job, which has ended."""
        self._fields["spec"] = spec

    def resume(self) -> None:
        """Resumes the job after its end."""
        self.resumes += 1
        self.state = JobState.PREPARING
        self.desire(DesiredState.PREPARE)

    def take(self, record: Record) -> None:
        if record.n <= len(self.records):
            return
        assert record.n == len(self.records) + 1, "a hole in the driver's numbers"
        self.records.append(record)
        if record.kind == "prepared" and self.state is JobState.PREPARING:
            self.state = JobState.QUEUED
            if self._is_admitted():
                self.desire(DesiredState.RUN)
        if record.kind == "state":
            self._take_state(JobState(record.data["state"]))

    def _take_state(self, new: JobState) -> None:
        if not may_follow(self.state, new):
            self.ignored.append(f"{new} after {self.state}")
            return
        self.state = new
        if new is JobState.QUEUED:
            self.desire(DesiredState.RUN)
        # A paused job is resumed some day: here, at once.
        if new is JobState.PAUSED:
            self.state = JobState.QUEUED
            self.desire(DesiredState.RUN)

    def take_report(self, record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            step = record["data"]["step"]
            self.steps[step] = max(self.steps.get(step, 0), record["attempt"])

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.kind == kind]

    def events(self, code: str) -> list[Record]:
        return [row for row in self.of_kind("event") if row.data["type"] == code]


class FakeOutbox:
    """The outbox over a connection that never waits."""

    replaced: str | None = None

    def __init__(
        self, control_plane: FakeControlPlane, log: RecordLog, clock: FakeClock
    ) -> None:
        self._control_plane = control_plane
        self._log = log
        self._clock = clock

    def open(
        self, epoch: int, from_checkpoints: Mapping[str, Sequence[Line]] | None = None
    ) -> list[Record]:
        logged = self._log.load()
        for record in logged:
            self._control_plane.take(record)
        for source, lines in (from_checkpoints or {}).items():
            self.relay(source, lines)
        return logged

    @property
    def desired(self) -> DesiredJob | None:
        return self._control_plane.desired

    def append(self, kind: str, data: dict[str, Any], attempt: int) -> None:
        self._control_plane.take(self._log.append(kind, data, attempt))

    def relay(self, source: str, lines: Iterable[Line]) -> None:
        if self._control_plane.loses_reports:
            return  # on their way, and gone with the driver
        for line in lines:
            self._control_plane.take_report(line.value())

    def stored(self, source: str) -> int:
        if self._control_plane.loses_reports:
            return 0
        return 1 << 30

    def unstored_before(self, source: str) -> list[Record]:
        unstored = self._control_plane.unstored
        return [record for name in unstored if name != source for record in unstored[name]]

    def last(self, source: str) -> int:
        return 0

    def wait(self, timeout_s: float) -> None:
        self._clock.advance(timeout_s)

    def flush(self, *, timeout_s: float | None = None) -> bool:
        return True

    def close(self) -> None:
        pass


class FakeProcess:
    """One worker process; it does a step each time it is polled."""

    def __init__(self, worker: WorkerToStart, pid: int, version: str) -> None:
        self.slot = worker.slot
        self.bundle = worker.bundle
        self.pid = pid
        self.is_spare = worker.is_spare
        self.version = version
        self.order: StartRequest | None = None
        self.step = 0
        self.lines: list[Line] = []
        self.state = RankState.IDLE
        self.must_stop = False
        self.late_turns = 0
        """Polls during which it does no step."""
        self.error: dict[str, Any] | None = None
        self.copies: list[CopyFacts] = []
        self.profiles: list[ProfileRequest] = []
        """Requests as they have come."""

    def is_late(self) -> bool:
        """Whether it does nothing in this turn."""
        is_late = self.late_turns > 0
        self.late_turns = max(0, self.late_turns - 1)
        return is_late

    def report(self, kind: str, data: dict[str, Any]) -> None:
        assert self.order is not None
        n = len(self.lines) + 1
        record = {
            "n": n,
            "at": 0.0,
            "kind": kind,
            "attempt": self.order.attempt,
            "data": data,
        }
        self.lines.append(Line(n, kind, json.dumps(record).encode()))

    def start(self, order: StartRequest, last_step: int) -> None:
        self.order = order
        self.state = RankState.RUNNING
        self.must_stop = False
        self.lines = []
        self.error = None
        self.step = 0
        if order.copy is not None:
            self.step = order.copy.step
        elif order.resume_from:
            self.step = int(order.resume_from.rpartition("step-")[2].split("-")[0])
        # Training was over; the driver died before it recorded that.
        if self.step == last_step:
            self.state = RankState.FINISHED


@dataclass
class FakeCluster:
    """Processes and resources; they live on when the driver dies."""

    steps: int
    """The job's last step."""
    save_every: int
    dies: tuple[int, int] | None = None
    """Rank that dies before a step, and the step; once."""
    ended_pids: set[int] = field(default_factory=set)
    """Processes that were ended by a signal, beside Ray's kill."""
    hangs: tuple[int, int] | None = None
    """Rank that stops in its own code before a step, and the step; ends with its process."""
    hangs_in: str = "megatron_ray/data/indexed.py"
    """File of the code that it stops in."""
    hangs_until: float = float("inf")
    """When it goes on, if its process lives."""
    answers: bool = True
    """Whether that rank still answers when it is examined."""
    paces: dict[int, float] = field(default_factory=dict)
    """Own seconds of a step, by rank; other ranks take half of `step_s`."""
    exit_every: int | None = None
    """Steps after which the ranks end at a limit of the spec."""
    flops: dict[str, float] = field(default_factory=dict)
    """What the ranks of a node measure before training, by id; others measure 1e12."""
    stuck_rank: int | None = None
    """Rank that measures nothing."""
    step_s: float = 0.0
    clock: FakeClock = field(default_factory=FakeClock)
    on_step: Callable[[FakeProcess], None] = lambda process: None
    workers: dict[int, FakeProcess] = field(default_factory=dict)
    nodes: tuple[NodeInfo, ...] = (NODE,)
    lost: dict[str, float] = field(default_factory=dict)
    """When nodes died, by id."""
    dying: set[int] = field(default_factory=set)
    """Slots whose process still answers, on a node that has died."""
    drains: dict[str, float | None] = field(default_factory=dict)
    """When nodes that are being drained go, by id."""
    homes: tuple[NodeInfo, ...] = ()
    """Nodes of the placement group; none: all."""
    stops: bool = True
    """Whether ranks follow a command to stop."""
    num_bundles: int = 0
    """Of the placement group; 0: there is none."""
    pids: int = 100
    version: str = "1"
    """Version of the code that is installed now."""

    def start_process(self, worker: WorkerToStart) -> None:
        if worker.slot not in self.workers:
            self.pids += 1
            self.workers[worker.slot] = FakeProcess(worker, self.pids, self.version)

    def node_of(self, bundle: int) -> NodeInfo:
        """The bundles lie on the nodes in turn, and stay there."""
        homes = self.homes or self.nodes
        return homes[bundle % len(homes)]

    def place(self, plan: PlacementPlan) -> None:
        """Places the bundles on nodes that the plan does not avoid."""
        self.num_bundles = len(plan.bundles)
        self.homes = tuple(
            node for node in self.nodes if node.node_id not in plan.avoid_nodes
        )

    def lose(self, node_id: str, *, survivors: int = 0) -> None:
        """A node dies; Ray goes on listing it for a while, and its bundles.

        The last `survivors` of its processes end a moment later.
        """
        self.lost[node_id] = self.clock.now
        slots = []
        for process in self.workers.values():
            if self.node_of(process.bundle).node_id == node_id:
                slots.append(process.slot)
        killed = len(slots) - survivors
        for slot in slots[:killed]:
            del self.workers[slot]
        self.dying.update(slots[killed:])

    def listed_nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes as Ray lists them."""
        listed = []
        for node in self.nodes:
            lost_at = self.lost.get(node.node_id, self.clock.now)
            alive = self.clock.now - lost_at < NOTICED_S
            draining = node.node_id in self.drains
            update = {"alive": alive, "draining": draining}
            listed.append(node.model_copy(update=update))
        return tuple(listed)

    def advance(self, process: FakeProcess) -> None:
        """Does one step, unless the attempt is over."""
        assert process.order is not None
        rank = process.order.env.rank
        if process.state is not RankState.RUNNING or process.is_late():
            return
        if self._measures(process):
            return
        if self.dies == (rank, process.step + 1):
            self.dies = None
            del self.workers[process.slot]
            return
        if self._is_held_up(process):
            return
        process.step += 1
        if rank == 0:
            self.clock.advance(self.step_s)
        process.report(
            "step",
            {"step": process.step, "loss": 1.0 / process.step, "step_s": self.step_s},
        )
        self._profile(process, rank)
        self._copy(process)
        is_last = process.step == self.steps
        is_exit = self.exit_every is not None and process.step % self.exit_every == 0
        must_end = process.must_stop or is_exit
        if is_last or must_end or process.step % self.save_every == 0:
            self._save(process, rank)
        if is_last:
            process.state = RankState.FINISHED
        elif is_exit:
            process.state = RankState.EXITED
        elif process.must_stop:
            process.state = RankState.STOPPED
        self.on_step(process)

    def _is_held_up(self, process: FakeProcess) -> bool:
        if self.clock() >= self.hangs_until:
            self.hangs = None
        # The others wait for the one that hangs.
        return self.hangs is not None and process.step + 1 >= self.hangs[1]

    def _measures(self, process: FakeProcess) -> bool:
        """Does a pre-flight, if there is one to do; returns whether there is."""
        order = process.order
        assert order is not None
        if order.preflight is None or process.lines:
            return False
        rank = order.env.rank
        if rank == self.stuck_rank:
            return True
        flops = self.flops.get(self.node_of(process.bundle).node_id, 1e12)
        for part, peer in order.preflight.parts:
            # The others wait for the one that measures nothing.
            if part == "device":
                report = SpeedReport(part, device="fake", flops=flops, bytes_per_s=1e9)
            elif self.stuck_rank is None:
                report = SpeedReport(part, peer=peer, bytes_per_s=1e9)
            else:
                return True
            process.report(report.kind, vars(report))
        if order.spec["preflight"]["mode"] == "only":
            process.state = RankState.FINISHED
        return True

    def end_processes(self, pids: Mapping[str, Sequence[int]]) -> None:
        for of_node in pids.values():
            self.ended_pids.update(of_node)

    def is_hung(self, process: FakeProcess | None) -> bool:
        if process is None or process.order is None or self.hangs is None:
            return False
        return process.order.env.rank == self.hangs[0]

    def pace(self, process: FakeProcess, rank: int) -> Pace:
        own_s = self.paces.get(rank, self.step_s / 2)
        return Pace(process.step, process.step * own_s, process.step * self.step_s)

    def evidence(self, process: FakeProcess) -> RankEvidence | None:
        """What the process would answer; None when it does not."""
        assert process.order is not None
        rank = process.order.env.rank
        frames = (Frame(self.hangs_in, 88, "IndexedCorpus.read"),)
        if self.is_hung(process):
            row = RankEvidence(
                rank, "data", groups={"tp": GroupCounts(0, 7)}, frames=frames
            )
            return row if self.answers else None
        wait = Wait("all_reduce", "tp", 8, 0, 11.0)
        return RankEvidence(rank, "reduce", wait=wait, groups={"tp": GroupCounts(0, 8)})

    def _profile(self, process: FakeProcess, rank: int) -> None:
        """Reports the profile whose last step this was."""
        for request in dict.fromkeys(process.profiles):
            if request.last_step == process.step:
                report = ProfileReport(
                    rank, request.number, request.first_step, request.last_step, "/p"
                )
                process.report(ProfileReport.kind, asdict(report))

    def _copy(self, process: FakeProcess) -> None:
        """Keeps a copy here and at the partner, when one is due."""
        order = process.order
        assert order is not None
        if order.partner is None:
            return
        if process.step % order.spec["checkpoint"]["peer_every_steps"] == 0:
            copy = CopyFacts(
                layout=layout_of(order.spec, order.data, order.env.world_size),
                attempt=order.attempt,
                step=process.step,
                rank=order.env.rank,
            )
            for other in self.workers.values():
                env = other.order and other.order.env
                if other is process or (env and env.rank == order.partner):
                    other.copies.append(copy)

    def _save(self, process: FakeProcess, rank: int) -> None:
        assert process.order is not None
        storage_path = process.order.spec["storage"]["path"]
        folder = Path(checkpoint_path(storage_path, process.step, process.order.attempt))
        folder.mkdir(parents=True, exist_ok=True)
        world_size = process.order.env.world_size
        index = {"files": {f"rank-{number}": 1 for number in range(world_size)}}
        (folder / "index.json").write_text(json.dumps(index))
        (folder / f"rank-{rank}").write_text("x")
        process.report(
            "checkpoint_written",
            {
                "step": process.step,
                "path": str(folder),
                "bytes_written": 1,
                "seconds": 0.0,
            },
        )


class ReadyPlacementGroup:
    """A placement group that needs no waiting for."""

    def wait(self, timeout_s: float) -> bool:
        return True


class FakeGroup:
    """WorkerGroup over the fake cluster; every act may be the driver's last."""

    def __init__(self, cluster: FakeCluster, faults: FaultInjector) -> None:
        self._cluster = cluster
        self._faults = faults
        self._slots: set[int] = set()
        self._calls: dict[int, tuple[int, Poll]] = {}

    @property
    def is_requested(self) -> bool:
        return bool(self._cluster.num_bundles)

    def placement_group(self, plan: PlacementPlan) -> ReadyPlacementGroup:
        self._faults.act()
        # Get or create.
        if not self._cluster.num_bundles:
            self._cluster.place(plan)
        return ReadyPlacementGroup()

    def nodes(self, plan: PlacementPlan) -> dict[int, str]:
        bundles = range(self._cluster.num_bundles)
        return {bundle: self._cluster.node_of(bundle).node_id for bundle in bundles}

    def create(
        self, plan: PlacementPlan, workers: Iterable[WorkerToStart], num_threads: int
    ) -> None:
        for worker in workers:
            self._faults.act()
            self._cluster.start_process(worker)
            self._slots.add(worker.slot)

    def adopt(self, slots: Iterable[int]) -> tuple[int, ...]:
        asked = set(slots)
        living = self._cluster.workers.keys()
        self._slots |= asked & living
        return tuple(sorted(asked - living))

    def open_store(
        self, slot: int, fence: Fence, timeout_s: float, stop: Callable[[], None]
    ) -> tuple[str, int]:
        self._faults.act()
        return "store", self._cluster.workers[slot].pid

    def probe(
        self, slots: Iterable[int], fence: Fence, timeout_s: float, stop: Callable[[], None]
    ) -> list[SlotFacts]:
        dead = self._cluster.dying.intersection(slots)
        if dead:
            self._cluster.dying.clear()
            raise WorkerGroupError("the node has died", dead, FailureKind.NODE_LOST)
        return [self._facts(slot) for slot in sorted(slots)]

    def look_up(
        self, slots: Iterable[int], fence: Fence, timeout_s: float
    ) -> tuple[list[SlotFacts], tuple[int, ...]]:
        living = []
        dead = []
        for slot in slots:
            if slot in self._cluster.workers:
                living.append(self._facts(slot))
            else:
                dead.append(slot)
        return living, tuple(dead)

    def _facts(self, slot: int) -> SlotFacts:
        process = self._cluster.workers[slot]
        return SlotFacts(
            slot=slot,
            pid=process.pid,
            is_spare=process.is_spare,
            bundle=process.bundle,
            node_id=self._cluster.node_of(process.bundle).node_id,
            address=self._cluster.node_of(process.bundle).address,
        )

    def copies(self, fence: Fence, timeout_s: float) -> dict[int, tuple[CopyFacts, ...]]:
        living = self._slots & self._cluster.workers.keys()
        return {slot: tuple(self._cluster.workers[slot].copies) for slot in living}

    def copied_reports(
        self, slot: int, fence: Fence, copies: CopySet, timeout_s: float
    ) -> list[Line]:
        return []

    def start(
        self,
        fence: Fence,
        orders: Mapping[int, StartRequest],
        timeout_s: float,
        stop: Callable[[], None],
    ) -> None:
        for slot, order in orders.items():
            self._faults.act()
            process = self._cluster.workers[slot]
            assert process.state is not RankState.RUNNING, (
                "the ranks of the attempt before must have left"
            )
            assert process.version == self._cluster.version, (
                "a driver gives orders to processes of its own version"
            )
            process.start(order, self._cluster.steps)

    def poll(self, slot: int, rank: int, fence: Fence, poll: Poll) -> None:
        self._calls[rank] = (slot, poll)

    def collect(self, timeout_s: float) -> list[PollResult]:
        self._cluster.clock.advance(timeout_s)
        calls = sorted(self._calls.items())
        self._calls.clear()
        return [self._answer(rank, slot, poll) for rank, (slot, poll) in calls]

    def _answer(self, rank: int, slot: int, poll: Poll) -> PollResult:
        process = self._cluster.workers.get(slot)
        if process is not None:
            self._cluster.advance(process)
        if slot not in self._cluster.workers:
            death = Death(FailureKind.PROCESS_DIED, "its process died: SIGKILL")
            return PollResult(rank, death=death)
        assert process is not None
        assert process.order is not None
        after = poll.after
        if after is None:
            after = poll.released
        lines = []
        for line in process.lines:
            if line.n > after and (poll.steps or line.kind != "step"):
                lines.append(line)
        reply = NextReply(
            state=process.state,
            attempt=process.order.attempt,
            last_n=len(process.lines),
            lines=lines,
            step=process.step,
            reports=process.step,
            pace=self._cluster.pace(process, rank),
            error=process.error,
        )
        return PollResult(rank, reply)

    def inspect(self, fence: Fence, timeout_s: float) -> dict[int, RankEvidence]:
        self._cluster.clock.advance(0.1)
        evidence = {}
        for slot, process in self._cluster.workers.items():
            if process.order is not None:
                row = self._cluster.evidence(process)
                if row is not None:
                    evidence[slot] = row
        return evidence

    def profile(
        self, slots: Iterable[int], fence: Fence, request: ProfileRequest, timeout_s: float
    ) -> tuple[int, ...]:
        self._faults.act()
        taken = []
        for slot in slots:
            process = self._cluster.workers.get(slot)
            if process is not None and self._cluster.answers:
                process.profiles.append(request)
                taken.append(slot)
        return tuple(taken)

    def stacks_from_outside(
        self, pids: Mapping[int, int], fence: Fence, timeout_s: float
    ) -> dict[int, str]:
        return dict.fromkeys(pids.values(), "Thread 1 (idle)\n    sleep")

    def drop_calls(self) -> None:
        self._calls.clear()

    def command(self, slot: int, fence: Fence, command: Command) -> None:
        self._faults.act()
        # The ranks agree among themselves.
        for process in self._cluster.workers.values():
            asked = command >= Command.STOP and self._cluster.stops
            process.must_stop = process.must_stop or asked

    def leave(
        self, fence: Fence, timeout_s: float
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        self._faults.act()
        free = []
        silent = []
        for slot in sorted(self._slots & self._cluster.workers.keys()):
            process = self._cluster.workers[slot]
            if not self._cluster.is_hung(process):
                process.state = RankState.IDLE
                free.append(slot)
            else:
                silent.append(slot)
        return tuple(free), tuple(silent)

    def kill_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._faults.act()
            process = self._cluster.workers.pop(slot, None)
            self._slots.discard(slot)
            if self._cluster.is_hung(process):
                self._cluster.hangs = None

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(sorted(self._slots))

    def num_bundles(self) -> int | None:
        return self._cluster.num_bundles or None

    def retire(self, fence: Fence, num_slots: int, timeout_s: float) -> tuple[str, ...]:
        self._faults.act()
        return (NODE.node_id,)

    def remove_all(self, num_slots: int) -> None:
        self._faults.act()
        self._cluster.workers.clear()
        self._faults.act()
        self._cluster.num_bundles = 0
        self._slots.clear()


class FakeTasks:
    """Runs no task: the data are prepared already."""

    def anywhere(self, body: Callable[..., Any], *args: Any) -> None:
        return None

    def is_done(self, call: None) -> bool:
        return True

    def result(self, call: None) -> dict[str, Any]:
        return {"prepared": PREPARED}

    def end(self, call: None) -> None:
        pass


class FakeDeadRankFiles:
    """Notes the attempts and ranks whose files were fetched."""

    def __init__(self, fetched: set[tuple[int, int]]) -> None:
        self._fetched = fetched

    def collect(self, dead: Iterable[DeadRank]) -> None:
        for rank in dead:
            self._fetched.add((rank.attempt, rank.place.rank))

    def finish(self, dead: Iterable[DeadRank]) -> None:
        self.collect(dead)

    def take_bad_nodes(self) -> list[BadNode]:
        return []

    def start_sweep(self, job_id: str, nodes: Iterable[str]) -> None:
        pass

    def await_sweep(self, timeout_s: float) -> None:
        pass


class FakeDrainWatch:
    """Knows of every drain at once."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster

    @property
    def deadlines(self) -> Mapping[str, float | None]:
        return self._cluster.drains

    def close(self) -> None:
        pass


class FakeGauges:
    """Shows nothing."""

    def update(self, step: dict[str, Any], attempt: int, goodput: float | None) -> None:
        pass


class ImmediateExecutor:
    """An executor in the caller's thread, so that every run goes the same way."""

    def submit(self, body: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(body(*args))
        except Exception as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True) -> None:
        pass


def fake_ports(
    cluster: FakeCluster,
    control_plane: FakeControlPlane,
    job_dir: str,
    faults: FaultInjector | None = None,
    fetched: set[tuple[int, int]] | None = None,
) -> JobPorts:
    """Returns the dependencies of one incarnation of the driver."""
    faults = faults or FaultInjector()
    storage = FakeStorage(job_dir, faults)
    fakes: dict[str, Any] = {
        "open_storage": lambda path: FakeStorage(path, faults),
        "outbox": FakeOutbox(control_plane, RecordLog(storage), cluster.clock),
        "group": FakeGroup(cluster, faults),
        "tasks": FakeTasks(),
        "read_nodes": cluster.listed_nodes,
        "drains": FakeDrainWatch(cluster),
        "unreachable_nodes": lambda ids: tuple(sorted(cluster.lost.keys() & set(ids))),
        "end_processes": cluster.end_processes,
        "dead_rank_files": FakeDeadRankFiles(set() if fetched is None else fetched),
        "logs": JobLogs(storage),
        "gauges": FakeGauges(),
        "executor": ImmediateExecutor(),
        "clock": cluster.clock,
        "jitter": lambda: 0.5,
        "code_version": cluster.version,
    }
    return JobPorts(**fakes)
