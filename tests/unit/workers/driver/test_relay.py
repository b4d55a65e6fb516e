"""What reports of a rank become in the history of a job."""

import json
import math

import pytest

from workers.driver.relay import to_record
from workers.rank.spool import Line


def test_a_broken_rule_is_a_warning_in_the_history() -> None:
    data = {"step": 2, "verdict": "stop", "message": "the loss of step 2 is 30"}
    text = json.dumps({"n": 5, "kind": "training_rule", "attempt": 1, "data": data})
    event = to_record(Line(5, "training_rule", text.encode())).value()["data"]
    assert (event["type"], event["level"]) == ("rank.training_rule", "warn")
    assert event["message"] == data["message"]


def test_a_skipped_step_is_a_warning_in_the_history() -> None:
    words = "step 2 skipped, weights unchanged: its gradient norm is nan"
    data = {"step": 2, "loss": 9.5, "grad_norm": math.nan, "message": words}
    text = json.dumps({"n": 5, "kind": "skipped_step", "attempt": 1, "data": data})
    record = to_record(Line(5, "skipped_step", text.encode())).value()
    assert (record["n"], record["kind"]) == (5, "event")
    assert (record["data"]["type"], record["data"]["level"]) == (
        "rank.skipped_step",
        "warn",
    )
    assert record["data"]["message"] == words


def test_numbers_of_callbacks_are_sent_as_they_are() -> None:
    data = {"step": 10, "numbers": {"grad_norm/layers.0": 0.5}}
    text = json.dumps({"n": 7, "kind": "monitors", "attempt": 1, "data": data}).encode()
    line = Line(7, "monitors", text)
    assert to_record(line) is line


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        (
            {"groups": [0, 1, 2], "joined": [1, 2]},
            "info",
            "3 of 3 replica groups are there after step 8: 0, 1, 2; joined: 1, 2",
        ),
        (
            {"groups": [0, 2], "lost": [1]},
            "warn",
            "2 of 3 replica groups are there after step 8: 0, 2; lost: 1",
        ),
    ],
)
def test_replica_groups_that_join_or_are_lost_are_in_the_history(
    changes: dict[str, list[int]], level: str, message: str
) -> None:
    data = {"step": 8, "num_groups": 3, "joined": [], "lost": [], **changes}
    text = json.dumps({"n": 5, "kind": "replica_groups", "attempt": 1, "data": data})
    event = to_record(Line(5, "replica_groups", text.encode())).value()["data"]
    assert (event["type"], event["level"]) == ("rank.replica_groups", level)
    assert event["message"] == message
