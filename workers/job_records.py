"""A job's own records in the words of the wire. Owns: their fields. Must not know: when they are said."""

from collections.abc import Callable, Sequence
from typing import Any

from workers.outbox import Outbox
from workers.placement import RankPlace
from workers.states import AttemptState, JobState, StatusReason


class JobRecords:
    """Says things about one job; `attempt` gives the current attempt's number. Methods raise StorageError."""

    def __init__(self, outbox: Outbox, attempt: Callable[[], int]) -> None:
        self._outbox, self._attempt = outbox, attempt
        self.last_state: JobState | None = None

    def state(self, state: JobState, reason: StatusReason | None = None, message: str = "") -> None:
        """The job's observed state."""
        self.last_state = state
        self._say("state", {"state": state.value, "reason": reason.value if reason else None, "message": message})

    def attempt(self, state: AttemptState, world_size: int, reason: StatusReason | None = None, message: str = "") -> None:
        """The attempt's state."""
        data = {"state": state.value, "reason": reason.value if reason else None, "message": message, "world_size": world_size}
        self._say("attempt", data)

    def event(self, kind: str, message: str, level: str = "info", data: dict[str, Any] | None = None, ranks: Sequence[int] = ()) -> None:
        """Anything worth a line in the history."""
        self._say("event", {"type": kind, "level": level, "message": message, "data": data or {}, "ranks": list(ranks)})

    def ranks(self, places: Sequence[RankPlace]) -> None:
        """The rank map."""
        self._say("ranks", {"ranks": [place.model_dump(mode="json", exclude={"local_dir"}) for place in places]})

    def prepared(self, manifest: dict[str, Any], num_train_tokens: int, unigram_nats: float | None) -> None:
        """The data are ready."""
        self._say("prepared", {"manifest": manifest, "num_train_tokens": num_train_tokens, "unigram_nats": unigram_nats})

    def problems(self, problems: list[dict[str, str]]) -> None:
        """The user's mistakes; the service fails the job with them."""
        self._say("problem", {"problems": problems})

    def committed(self, step: int, path: str, size: int, loss: float | None) -> None:
        """A checkpoint counts from now on."""
        self._say("checkpoint", {"action": "committed", "step": step, "path": path, "bytes": size, "loss": loss})

    def deleted(self, path: str) -> None:
        """Retention has deleted a checkpoint."""
        step = int(path.rpartition("/")[2].split("-")[1])
        self._say("checkpoint", {"action": "deleted", "step": step, "path": path})

    def _say(self, kind: str, data: dict[str, Any]) -> None:
        self._outbox.say(kind, data, self._attempt())
