"""A cluster and a service on paper: what a job's driver acts on, without Ray, HTTP or
time, so that it can die between any two acts.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ray.checkpoint.directory import checkpoint_path
from megatron_ray.commands import Command
from workers.decisions.failures import FailureKind
from workers.decisions.placement import PlacementPlan, SlotFacts
from workers.decisions.slot_assignment import WorkerToStart
from workers.driver.outbox import RecordLog
from workers.protocol.states import DesiredState, JobState, may_follow
from workers.protocol.wire import DesiredJob, Record
from workers.rank.messages import Fence, NextReply, Poll, RankState, StartOrder
from workers.rank.spool import Line
from workers.ray.worker_group import Answer, Death


class DriverDies(BaseException):
    """The driver's process is gone."""


class Mortality:
    """Counts the driver's acts and ends it at one of them."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.acts = 0

    def act(self) -> None:
        self.acts += 1
        if self.acts == self.at:
            raise DriverDies


class PaperService:
    """Keeps records as the service does: numbers without holes, the table of
    transitions, admission at once.
    """

    def __init__(self, spec: dict[str, Any], job_dir: str) -> None:
        self.records: list[Record] = []
        self.steps: dict[int, int] = {}
        self.away = False
        """Ranks' reports do not come through."""
        self.state = JobState.PREPARING
        self.ignored = list[str]()
        self._job: dict[str, Any] = {
            "job_id": "job-p",
            "spec": spec,
            "job_dir": job_dir,
            "token": "t",
            "revision": 1,
        }
        self.desired = DesiredJob(desired=DesiredState.PREPARE, **self._job)

    def want(self, desired: DesiredState) -> None:
        self._job["revision"] += 1
        self.desired = DesiredJob(desired=desired, **self._job)

    def take(self, record: Record) -> None:
        if record.n <= len(self.records):
            return
        assert record.n == len(self.records) + 1, "a hole in the driver's numbers"
        self.records.append(record)
        if record.kind == "prepared" and self.state is JobState.PREPARING:
            self.state = JobState.QUEUED
            self.want(DesiredState.RUN)
        if record.kind == "state":
            new = JobState(record.data["state"])
            if not may_follow(self.state, new):
                self.ignored.append(f"{new} after {self.state}")
            else:
                self.state = new

    def said(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.kind == kind]

    def events(self, type_: str) -> list[Record]:
        return [record for record in self.said("event") if record.data["type"] == type_]


class PaperOutbox:
    """The outbox over a link that never waits."""

    replaced: str | None = None

    def __init__(
        self,
        service: PaperService,
        book: RecordLog,
        said: Iterable[Record],
        recalled: Mapping[str, Sequence[Line]],
    ) -> None:
        self._service = service
        self._book = book
        for record in said:
            service.take(record)
        for source, lines in recalled.items():
            self.relay(source, lines)

    @property
    def desired(self) -> DesiredJob:
        return self._service.desired

    def say(self, kind: str, data: dict[str, Any], attempt: int) -> None:
        self._service.take(self._book.append(kind, data, attempt))

    def relay(self, source: str, lines: Iterable[Line]) -> None:
        if self._service.away:
            return  # on its way, and gone with the driver
        for line in lines:
            record = line.value()
            if record["kind"] == "step":
                step = record["data"]["step"]
                self._service.steps[step] = max(
                    self._service.steps.get(step, 0), record["attempt"]
                )

    def stored(self, source: str) -> int:
        return 0 if self._service.away else 1 << 30

    def last(self, source: str) -> int:
        return 0

    def wait(self, timeout_s: float) -> None:
        pass

    def flush(self, *, timeout_s: float | None = None) -> bool:
        return True

    def close(self) -> None:
        pass


class _Worker:
    def __init__(self, slot: int, pid: int, standby: bool, version: str) -> None:
        self.slot = slot
        self.pid = pid
        self.standby = standby
        self.version = version
        self.order: StartOrder | None = None
        self.step = 0
        self.lines = list[Line]()
        self.state = RankState.IDLE
        self.stop = False

    def say(self, kind: str, data: dict[str, Any]) -> None:
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


class PaperCluster:
    """Lives on when the driver dies.

    Rank `dies[0]` dies before its step `dies[1]`, once.
    """

    def __init__(self, steps: int, every: int, dies: tuple[int, int] | None) -> None:
        self.steps = steps
        self.every = every
        self.dies = dies
        self.workers: dict[int, _Worker] = {}
        self.placed = False
        self.pids = 100
        self.version = "1"
        self.saves_on_stop = True

    def recruit(self, recruit: WorkerToStart) -> _Worker:
        """A new process, of the code that is installed now."""
        self.pids += 1
        return _Worker(recruit.slot, self.pids, recruit.is_spare, self.version)

    def advance(self, worker: _Worker) -> None:
        """One step, unless the attempt is over; all ranks are told apart by nothing but
        their number.
        """
        assert worker.order is not None
        rank = worker.order.env.rank
        if worker.state is not RankState.RUNNING:
            return
        if self.dies == (rank, worker.step + 1):
            self.dies = None
            del self.workers[worker.slot]
            return
        worker.step += 1
        worker.say("step", {"step": worker.step, "loss": 1.0 / worker.step})
        last = worker.step == self.steps
        if last or worker.stop or worker.step % self.every == 0:
            self._save(worker, rank)
        if last or worker.stop:
            worker.state = RankState.FINISHED if last else RankState.STOPPED

    def _save(self, worker: _Worker, rank: int) -> None:
        assert worker.order is not None
        folder = Path(
            checkpoint_path(
                worker.order.spec["storage"]["path"], worker.step, worker.order.attempt
            )
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").write_text(
            json.dumps({"files": {"rank-0": 1, "rank-1": 1}})
        )
        (folder / f"rank-{rank}").write_text("x")
        worker.say(
            "checkpoint_written",
            {"step": worker.step, "path": str(folder), "bytes_written": 1, "seconds": 0.0},
        )


class PaperGroup:
    """WorkerGroup's face over the paper cluster; every act may be the driver's last,
    before it or after it.
    """

    def __init__(self, cluster: PaperCluster, mortality: Mortality) -> None:
        self._cluster = cluster
        self._mortality = mortality
        self._slots: set[int] = set()
        self._calls: dict[int, tuple[int, Poll]] = {}

    def placement_group(self, plan: PlacementPlan) -> Any:
        self._mortality.act()
        self._cluster.placed = True

        class Ready:
            def wait(self, timeout_s: float) -> bool:
                return True

        return Ready()

    def nodes(self, plan: PlacementPlan) -> dict[int, str]:
        return {bundle.index: "node" for bundle in plan.bundles}

    def create(
        self, plan: PlacementPlan, recruits: Iterable[WorkerToStart], num_threads: int
    ) -> None:
        for recruit in recruits:
            self._mortality.act()
            self._cluster.workers.setdefault(recruit.slot, self._cluster.recruit(recruit))
            self._slots.add(recruit.slot)

    def adopt(self, slots: Iterable[int]) -> tuple[int, ...]:
        wanted = set(slots)
        self._slots |= wanted & self._cluster.workers.keys()
        return tuple(sorted(wanted - self._cluster.workers.keys()))

    def open_store(
        self, slot: int, fence: Fence, timeout_s: float, stop: Callable[[], None]
    ) -> tuple[str, int]:
        self._mortality.act()
        return "paper", self._cluster.workers[slot].pid

    def probe(
        self, slots: Iterable[int], fence: Fence, timeout_s: float, stop: Callable[[], None]
    ) -> list[SlotFacts]:
        return [self._facts(slot) for slot in sorted(slots)]

    def look_up(
        self, slots: Iterable[int], fence: Fence, timeout_s: float
    ) -> tuple[list[SlotFacts], tuple[int, ...]]:
        living = [slot for slot in slots if slot in self._cluster.workers]
        return [self._facts(slot) for slot in living], tuple(set(slots) - set(living))

    def _facts(self, slot: int) -> SlotFacts:
        worker = self._cluster.workers[slot]
        return SlotFacts(
            slot=slot,
            pid=worker.pid,
            is_spare=worker.standby,
            bundle=0,
            node_id="node",
            address="127.0.0.1",
        )

    def start(
        self,
        fence: Fence,
        orders: Mapping[int, StartOrder],
        timeout_s: float,
        stop: Callable[[], None],
    ) -> None:
        for slot, order in orders.items():
            self._mortality.act()
            worker = self._cluster.workers[slot]
            assert worker.state is not RankState.RUNNING, (
                "the ranks of the attempt before must have left"
            )
            assert worker.version == self._cluster.version, (
                "a driver gives orders to processes of its own version"
            )
            worker.order = order
            worker.state = RankState.RUNNING
            worker.stop = False
            worker.lines = []
            worker.step = (
                int(order.resume_from.rpartition("step-")[2].split("-")[0])
                if order.resume_from
                else 0
            )
            if (
                worker.step == self._cluster.steps
            ):  # all that was missing is that somebody said so
                worker.state = RankState.FINISHED

    def poll(self, slot: int, rank: int, fence: Fence, poll: Poll) -> None:
        self._calls[rank] = (slot, poll)

    def collect(self, timeout_s: float) -> list[Answer]:
        answers = []
        for rank, (slot, poll) in sorted(self._calls.items()):
            worker = self._cluster.workers.get(slot)
            if worker is not None:
                self._cluster.advance(worker)
                worker = self._cluster.workers.get(slot)
            if worker is None:
                answers.append(
                    Answer(
                        rank,
                        death=Death(FailureKind.PROCESS_DIED, "its process died: SIGKILL"),
                    )
                )
                continue
            assert worker.order is not None
            after = poll.released if poll.after is None else poll.after
            lines = [line for line in worker.lines if line.n > after]
            shown = [line for line in lines if poll.steps or line.kind != "step"]
            answers.append(
                Answer(
                    rank,
                    NextReply(
                        worker.state,
                        worker.order.attempt,
                        len(worker.lines),
                        shown,
                        worker.step,
                        worker.step,
                    ),
                )
            )
        self._calls.clear()
        return answers

    def drop_calls(self) -> None:
        self._calls.clear()

    def command(self, slot: int, fence: Fence, command: Command) -> None:
        self._mortality.act()
        # the ranks agree among themselves
        for worker in self._cluster.workers.values():
            worker.stop = worker.stop or command >= Command.STOP

    def leave(self, fence: Fence, timeout_s: float) -> tuple[int, ...]:
        self._mortality.act()
        free = sorted(self._slots & self._cluster.workers.keys())
        for slot in free:
            self._cluster.workers[slot].state = RankState.IDLE
        return tuple(free)

    def kill_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._mortality.act()
            self._cluster.workers.pop(slot, None)
            self._slots.discard(slot)

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(sorted(self._slots))

    def retire(self, fence: Fence, num_slots: int, timeout_s: float) -> tuple[str, ...]:
        self._mortality.act()
        return ("node",)

    def remove_all(self, num_slots: int) -> None:
        self._mortality.act()
        self._cluster.workers.clear()
        self._mortality.act()
        self._cluster.placed = False
        self._slots.clear()
