"""A job's own records in the words of the wire.

Owns: their fields, and that nothing is said twice. Must not know: when.

A driver writes its journal and says its records in two steps, and may die in between.
Each step can therefore be taken again: what an earlier incarnation has said already is
known from its own book of records and is not said a second time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from workers.decisions.placement import RankPlace
from workers.driver.outbox import Outbox
from workers.protocol.states import AttemptState, JobState, StatusReason
from workers.protocol.wire import Record

_ENDED = (AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.STOPPED)


class JobRecords:
    """Says things about one job; `attempt` gives the current attempt's number, `said`
    what earlier incarnations have said.

    Methods raise StorageError.
    """

    def __init__(
        self, outbox: Outbox, attempt: Callable[[], int], said: Iterable[Record] = ()
    ) -> None:
        self._outbox = outbox
        self._attempt = attempt
        self._state: dict[str, Any] = {}
        self._attempts: dict[int, AttemptState] = {}
        self._mapped: set[int] = set()
        self._prepared = False
        self._kept: dict[str, int] = {}
        for record in said:
            self._learn(record.kind, record.data, record.attempt)

    @property
    def last_state(self) -> JobState | None:
        """The job's state as it was last said."""
        return JobState(self._state["state"]) if self._state else None

    @property
    def kept_checkpoints(self) -> dict[str, int]:
        """Steps of the checkpoints that were said to be committed and not yet to be
        deleted, by path.
        """
        return dict(self._kept)

    def attempt_state(self, attempt: int) -> AttemptState | None:
        """An attempt's state as it was last said."""
        return self._attempts.get(attempt)

    def state(
        self, state: JobState, reason: StatusReason | None = None, message: str = ""
    ) -> None:
        """The job's observed state."""
        data = {
            "state": state.value,
            "reason": reason.value if reason else None,
            "message": message,
        }
        if data != self._state:
            self._say("state", data)

    def attempt(
        self,
        state: AttemptState,
        world_size: int,
        reason: StatusReason | None = None,
        message: str = "",
    ) -> None:
        """The attempt's state; one that has ended stays ended."""
        known = self._attempts.get(self._attempt())
        if known != state and known not in _ENDED:
            data = {
                "state": state.value,
                "reason": reason.value if reason else None,
                "message": message,
                "world_size": world_size,
            }
            self._say("attempt", data)

    def event(
        self,
        kind: str,
        message: str,
        level: str = "info",
        data: dict[str, Any] | None = None,
        ranks: Sequence[int] = (),
    ) -> None:
        """Anything worth a line in the history."""
        self._say(
            "event",
            {
                "type": kind,
                "level": level,
                "message": message,
                "data": data or {},
                "ranks": list(ranks),
            },
        )

    def ranks(self, places: Sequence[RankPlace]) -> None:
        """The attempt's rank map."""
        if self._attempt() not in self._mapped:
            self._say(
                "ranks",
                {
                    "ranks": [
                        place.model_dump(mode="json", exclude={"local_dir"})
                        for place in places
                    ]
                },
            )

    def prepared(
        self, manifest: dict[str, Any], num_train_tokens: int, unigram_nats: float | None
    ) -> None:
        """The data are ready."""
        if not self._prepared:
            self._say(
                "prepared",
                {
                    "manifest": manifest,
                    "num_train_tokens": num_train_tokens,
                    "unigram_nats": unigram_nats,
                },
            )

    def problems(self, problems: list[dict[str, str]]) -> None:
        """The user's mistakes; the service fails the job with them."""
        self._say("problem", {"problems": problems})

    def committed(self, step: int, path: str, size: int, loss: float | None) -> None:
        """A checkpoint counts from now on."""
        if path not in self._kept:
            self._say(
                "checkpoint",
                {
                    "action": "committed",
                    "step": step,
                    "path": path,
                    "bytes": size,
                    "loss": loss,
                },
            )

    def deleted(self, path: str) -> None:
        """Retention has deleted a checkpoint."""
        if path in self._kept:
            self._say(
                "checkpoint", {"action": "deleted", "step": self._kept[path], "path": path}
            )

    def _say(self, kind: str, data: dict[str, Any]) -> None:
        attempt = self._attempt()
        self._outbox.say(kind, data, attempt)
        self._learn(kind, data, attempt)

    def _learn(self, kind: str, data: dict[str, Any], attempt: int) -> None:
        """What has been said."""
        if kind == "state":
            self._state = data
        elif kind == "attempt":
            self._attempts[attempt] = AttemptState(data["state"])
        elif kind == "ranks":
            self._mapped.add(attempt)
        elif kind == "prepared":
            self._prepared = True
        elif kind == "checkpoint" and data["action"] == "committed":
            self._kept[data["path"]] = data["step"]
        elif kind == "checkpoint":
            self._kept.pop(data["path"], None)
