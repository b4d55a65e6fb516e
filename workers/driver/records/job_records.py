"""Writes a job's own records and remembers their contents.

Owns: the fields of each kind of record, and that nothing is recorded twice. Must not
know: when something is recorded.

A driver writes records and journal in two steps and may die in between, so each step
must be repeatable: records of earlier incarnations are read from the log and are not
recorded a second time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_ray.data.prepared import PreparedData
from workers.decisions.placement import RankPlace
from workers.decisions.preflight.verdict import BlamedNode, Verdict
from workers.decisions.ranks.stragglers import SlowRank, describe_slow
from workers.driver.records.outbox import Outbox
from workers.protocol.events import EventLevel, EventType
from workers.protocol.states import AttemptState, JobState, StatusReason
from workers.protocol.wire import Record

_ENDED = (AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.STOPPED)


class JobRecords:
    """The records of one job.

    `attempt` returns the current attempt's number; `logged` are the records of earlier
    incarnations. Methods raise StorageError.
    """

    def __init__(
        self, outbox: Outbox, attempt: Callable[[], int], logged: Iterable[Record] = ()
    ) -> None:
        self._outbox = outbox
        self._attempt = attempt
        self._state: dict[str, Any] = {}
        self._attempts: dict[int, AttemptState] = {}
        self._attempts_with_map: set[int] = set()
        self._has_prepared = False
        self._kept: dict[str, int] = {}
        self._slow: dict[tuple[int, int], dict[str, Any]] = {}
        """Data of the event, by attempt and rank."""
        self._profiles: dict[tuple[int, int, int], dict[str, Any]] = {}
        """Reports by attempt, number of the request and rank."""
        self._blamed: dict[int, list[dict[str, str]]] = {}
        """Bad nodes, by attempt."""
        for record in logged:
            self._remember(record.kind, record.data, record.attempt)

    @property
    def last_state(self) -> JobState | None:
        """The job's state as it was last recorded."""
        if not self._state:
            return None
        return JobState(self._state["state"])

    @property
    def kept_checkpoints(self) -> dict[str, int]:
        """Steps by path of checkpoints recorded as committed and not yet as deleted."""
        return dict(self._kept)

    def attempt_state(self, attempt: int) -> AttemptState | None:
        """Returns an attempt's state as it was last recorded."""
        return self._attempts.get(attempt)

    def state(
        self, state: JobState, reason: StatusReason | None = None, message: str = ""
    ) -> None:
        """Records the job's observed state."""
        data = {"state": state.value, "reason": reason, "message": message}
        if data != self._state:
            self._append("state", data)

    def attempt(
        self,
        state: AttemptState,
        world_size: int,
        reason: StatusReason | None = None,
        message: str = "",
    ) -> None:
        """Records the attempt's state; an attempt that has ended stays ended."""
        # For example, a job that is cancelled after a failure would record STOPPED
        # after FAILED.
        known = self._attempts.get(self._attempt())
        if known == state or known in _ENDED:
            return
        data = {
            "state": state.value,
            "reason": reason,
            "message": message,
            "world_size": world_size,
        }
        self._append("attempt", data)

    def event(
        self,
        code: str,
        message: str,
        level: str = "info",
        data: dict[str, Any] | None = None,
        ranks: Sequence[int] = (),
    ) -> None:
        """Records a line of the history."""
        self._append(
            "event",
            {
                "type": code,
                "level": level,
                "message": message,
                "data": data or {},
                "ranks": list(ranks),
            },
        )

    def slow(self, slow: SlowRank, place: RankPlace) -> None:
        """Records that a rank has become slow, and where it runs."""
        data = {
            "own_s": round(slow.own_s, 6),
            "median_s": round(slow.median_s, 6),
            "ratio": round(slow.ratio, 3),
            **_where(place),
        }
        message = describe_slow(slow, place.address)
        self.event("rank.slow", message, "warn", data, (place.rank,))

    def recovered(self, place: RankPlace) -> None:
        """Records that a slow rank is as fast as its peers again."""
        message = f"rank {place.rank} on {place.address} is as fast as its peers again"
        self.event("rank.recovered", message, data=_where(place), ranks=(place.rank,))

    def slow_ranks(self, attempt: int) -> tuple[SlowRank, ...]:
        """Returns the ranks of an attempt that are recorded as slow."""
        slow = []
        for (slow_attempt, rank), data in self._slow.items():
            if slow_attempt == attempt:
                slow.append(SlowRank(rank, data["own_s"], data["median_s"]))
        return tuple(slow)

    def preflight(self, verdict: Verdict) -> None:
        """Records what the ranks have measured before training, and the verdict."""
        code = EventType.PREFLIGHT_PASSED
        level = EventLevel.INFO
        if not verdict.has_passed:
            code = EventType.PREFLIGHT_FAILED
            level = EventLevel.ERROR
        elif verdict.warnings:
            level = EventLevel.WARN
        self.event(code, verdict.sentence(), level, verdict.to_data())

    def blamed_nodes(self, attempt: int) -> tuple[BlamedNode, ...]:
        """Returns the nodes that were bad in the measurements of an attempt."""
        nodes = []
        for data in self._blamed.get(attempt, ()):
            nodes.append(BlamedNode(**data))
        return tuple(nodes)

    def ranks(self, places: Sequence[RankPlace]) -> None:
        """Records the attempt's rank map."""
        if self._attempt() in self._attempts_with_map:
            return
        # Folders on nodes are internal to the driver; the rest is served to clients.
        rows = [place.model_dump(mode="json", exclude={"local_dir"}) for place in places]
        self._append("ranks", {"ranks": rows})

    def prepared(self, data: PreparedData, num_steps: int) -> None:
        """Records that the data are ready."""
        if self._has_prepared:
            return
        record = {
            "manifest": data.model_dump(mode="json"),
            "num_train_tokens": data.num_train_tokens,
            "unigram_nats": data.unigram_nats,
            "steps": num_steps,
        }
        self._append("prepared", record)

    def diagnosis(self, report: dict[str, Any]) -> None:
        """Records what all ranks did at one moment, and which one the others wait for."""
        self._append("diagnosis", report)

    def profile(self, report: dict[str, Any]) -> None:
        """Records that a rank has written a profile, or why it has not."""
        # Reports of an adopted rank come again.
        key = self._attempt(), report["number"], report["rank"]
        if report != self._profiles.get(key):
            self._append("profile", report)

    def problems(self, problems: list[dict[str, str]]) -> None:
        """Records problems in the user's input, with which the service fails the job."""
        self._append("problem", {"problems": problems})

    def committed(self, step: int, path: str, size: int, loss: float | None) -> None:
        """Records that a checkpoint is committed."""
        # A path contains step and attempt, so it identifies one checkpoint.
        if path in self._kept:
            return
        data = {"step": step, "path": path, "bytes": size, "loss": loss}
        self._append("checkpoint", {"action": "committed", **data})

    def deleted(self, path: str) -> None:
        """Records that retention has deleted a checkpoint."""
        if path in self._kept:
            data = {"action": "deleted", "step": self._kept[path], "path": path}
            self._append("checkpoint", data)

    def _append(self, kind: str, data: dict[str, Any]) -> None:
        attempt = self._attempt()
        self._outbox.append(kind, data, attempt)
        self._remember(kind, data, attempt)

    def _remember(self, kind: str, data: dict[str, Any], attempt: int) -> None:
        """Remembers a record, so that it is not repeated."""
        match kind:
            case "state":
                self._state = data
                # Prepared anew: the job was resumed with other data.
                if data["state"] == JobState.PREPARING.value:
                    self._has_prepared = False
            case "attempt":
                self._attempts[attempt] = AttemptState(data["state"])
            case "ranks":
                self._attempts_with_map.add(attempt)
            case "event":
                self._remember_event(data, attempt)
            case "prepared":
                self._has_prepared = True
            case "profile":
                self._profiles[attempt, data["number"], data["rank"]] = data
            case "checkpoint" if data["action"] == "committed":
                self._kept[data["path"]] = data["step"]
            case "checkpoint":
                self._kept.pop(data["path"], None)

    def _remember_event(self, data: dict[str, Any], attempt: int) -> None:
        match data["type"]:
            case EventType.RANK_SLOW:
                self._slow[attempt, data["ranks"][0]] = data["data"]
            case EventType.RANK_RECOVERED:
                self._slow.pop((attempt, data["ranks"][0]), None)
            case EventType.PREFLIGHT_FAILED:
                self._blamed[attempt] = data["data"]["bad"]


def _where(place: RankPlace) -> dict[str, Any]:
    return {"node_id": place.node_id, "address": place.address, "gpu": place.gpu}
