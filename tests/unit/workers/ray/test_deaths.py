"""How an actor's death is classified and worded, and a rank's own failure."""

import json

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from workers.decisions.failures import FailureKind
from workers.driver.relay import to_record
from workers.rank.spool import Line
from workers.ray.deaths import death_of

SIGKILL = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RankWorker\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
    "Worker exit detail: Worker unexpectedly exits"
    " with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer"
)


class FakeActorDiedError(ActorDiedError):
    def __init__(self, text: str, preempted: bool = False) -> None:
        super().__init__()
        self.error_msg = text
        self._preempted = preempted


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            FakeActorDiedError(SIGKILL),
            FailureKind.PROCESS_DIED,
            "process killed or crashed (possibly out of memory)",
        ),
        (
            FakeActorDiedError("The actor died because its node has died. Node Id: 12ab"),
            FailureKind.NODE_LOST,
            "its node has died. Node Id: 12ab",
        ),
        (
            FakeActorDiedError("The actor died because its node has died.", preempted=True),
            FailureKind.PREEMPTED,
            "node preempted: ",
        ),
        (
            FakeActorDiedError(
                "The actor died because Task was killed due to the node running low on memory."
            ),
            FailureKind.NODE_MEMORY,
            "because the node was running out of memory",
        ),
        (
            ActorUnavailableError("no answer", b"1" * 16),
            FailureKind.PROCESS_DIED,
            "ActorUnavailableError",
        ),
    ],
)
def test_deaths_are_classified_and_worded(
    error: ActorDiedError, kind: FailureKind, words: str
) -> None:
    death = death_of(error)
    assert death.kind is kind
    assert words in death.message
    assert "common causes" not in death.message


@pytest.mark.parametrize(
    ("type_name", "text", "level", "words"),
    [
        ("ValueError", "no such thing", "warn", "rank 0: ValueError: no such thing"),
        (
            "RuntimeError",
            "Connection reset by peer",
            "info",
            "rank 0: a peer disconnected",
        ),
    ],
)
def test_warnings_begin_with_the_cause_not_with_its_echo(
    type_name: str, text: str, level: str, words: str
) -> None:
    record = {
        "n": 7,
        "kind": "failed",
        "data": {"type": type_name, "message": text, "traceback": "..."},
    }
    event = json.loads(to_record(Line(7, "failed", json.dumps(record).encode())).text)[
        "data"
    ]
    assert (event["level"], event["message"], event["ranks"]) == (level, words, [0])
