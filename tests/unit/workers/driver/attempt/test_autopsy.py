"""Ranks examined while an attempt runs: in a hang, on request, and those that are slow."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cluster import (
    JOB_ID,
    NODE,
    FakeCluster,
    FakeControlPlane,
    FakeProcess,
    fake_ports,
)
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import JobState
from workers.protocol.wire import Record


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(steps=6, save_every=2, step_s=1.0)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": 2, "dp": 1},
        "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
        "training": {"seq_length": 16, "global_batch_size": 2, "steps": 6},
        "optimizer": {"lr": 0.001},
        "storage": {"path": str(tmp_path)},
        "restart": {"hang_timeout_s": 10.0},
    }


@pytest.fixture
def control_plane(spec: dict[str, Any], tmp_path: Path) -> FakeControlPlane:
    return FakeControlPlane(spec, str(tmp_path))


def run(control_plane: FakeControlPlane, cluster: FakeCluster) -> None:
    assert control_plane.desired is not None
    folder = control_plane.desired.job_dir
    JobLifecycle(JOB_ID, folder, fake_ports(cluster, control_plane, folder)).run()


def only(records: list[Record]) -> dict[str, Any]:
    (record,) = records
    return record.data


def test_a_hang_is_diagnosed_before_anything_is_killed_and_names_the_rank(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.hangs = (1, 5)
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    report = only(control_plane.of_kind("diagnosis"))
    assert report["trigger"] == "hang"
    assert report["confidence"] == "high"
    (culprit,) = report["culprits"]
    assert (culprit["rank"], culprit["node_id"], culprit["address"]) == (
        1,
        "node",
        "127.0.0.1",
    )
    first, second = report["ranks"]
    assert (first["rank"], first["waits_in"]) == (1, None)
    assert second["waits_in"]["operation"] == "all_reduce"
    assert second["waits_in"]["number"] == 8
    frame = "IndexedCorpus.read (megatron_ray/data/indexed.py:88)"
    assert {"ranks": [1], "lines": [frame]} in report["stacks"]
    failure = only(control_plane.events("attempt.failed"))
    assert failure["ranks"] == [1]
    assert failure["data"]["kind"] == "hang"
    assert failure["message"].startswith(
        "rank 1: has not entered all_reduce 8 of tp, in which rank 0 has waited for 11 s; it "
        "reads data in IndexedCorpus.read (megatron_ray/data/indexed.py:88); no rank reported"
    )
    assert "(limit 10 s)" in failure["message"]
    # The records are in the order in which it happened.
    kinds = [
        record.data.get("type", record.kind)
        for record in control_plane.records
        if record.kind in ("diagnosis", "event")
    ]
    assert kinds.index("diagnosis") < kinds.index("attempt.failed")
    # Ray's kill does not always reach a process that does not answer.
    first_ranks = control_plane.of_kind("ranks")[0].data["ranks"]
    assert cluster.ended_pids == {first_ranks[1]["pid"]}


def test_ranks_that_wait_for_the_storage_are_not_ended_by_the_limit_of_a_hang(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.hangs = (1, 5)
    cluster.hangs_in = "megatron_ray/checkpoint/writer.py"
    cluster.hangs_until = cluster.clock() + 60.0
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert control_plane.of_kind("diagnosis") == []
    assert control_plane.events("attempt.failed") == []
    message = only(control_plane.events("storage.slow"))["message"]
    assert message.startswith(
        "the storage does not answer: no rank has reported anything for 10 s, and no rank is "
        "ended for it yet; rank 1 has not entered all_reduce 8 of tp"
    )
    assert "it works on a checkpoint in" in message


def test_a_storage_that_never_answers_is_a_hang_at_last(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.hangs = (1, 5)
    cluster.hangs_in = "megatron_ray/storage/storage.py"
    run(control_plane, cluster)
    assert only(control_plane.events("attempt.failed"))["data"]["kind"] == "hang"
    assert only(control_plane.of_kind("diagnosis"))["quiet_s"] >= 600.0


def test_a_hang_is_named_soon_after_its_limit(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.hangs = (0, 3)
    run(control_plane, cluster)
    report = only(control_plane.of_kind("diagnosis"))
    assert 10.0 <= report["quiet_s"] < 12.0


def test_a_rank_that_does_not_answer_is_named_and_its_stack_taken_by_a_neighbour(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.hangs = (1, 3)
    cluster.answers = False
    run(control_plane, cluster)
    report = only(control_plane.of_kind("diagnosis"))
    assert report["num_silent"] == 1
    assert report["ranks"][0]["answered"] is False
    assert report["stacks"][0] == {"ranks": [1], "lines": ["Thread 1 (idle)", "    sleep"]}
    assert only(control_plane.events("attempt.failed"))["message"].startswith(
        "rank 1: does not answer, and rank 0 has waited in all_reduce 8 of tp for 11 s"
    )


def test_a_request_is_answered_once_and_training_goes_on(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    def ask(process: FakeProcess) -> None:
        if process.step == 2 and control_plane.diagnosis_requests == 0:
            control_plane.request_diagnosis()

    cluster.on_step = ask
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert control_plane.events("attempt.failed") == []
    report = only(control_plane.of_kind("diagnosis"))
    assert report["trigger"] == "request"
    assert report["culprits"] == []
    assert report["reason"].startswith("the job makes progress")
    folder = Path(control_plane.desired.job_dir) if control_plane.desired else Path()
    entry = json.loads((folder / "attempts" / "0001.json").read_text())
    assert entry["diagnosis_requests"] == 1


def test_a_rank_whose_own_work_takes_longer_is_reported_once(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.steps = 80
    cluster.save_every = 40
    cluster.paces = {0: 0.2, 1: 0.9}
    run(control_plane, cluster)
    event = only(control_plane.events("rank.slow"))
    assert (event["level"], event["ranks"]) == ("warn", [1])
    assert event["data"]["ratio"] == pytest.approx(4.5)
    assert event["data"]["node_id"] == "node"
    assert "rank 1 on 127.0.0.1 is slow" in event["message"]
    assert control_plane.events("rank.recovered") == []


@pytest.mark.parametrize("is_excluded", [True, False])
def test_the_node_of_a_slow_rank_is_left_after_a_failure_if_the_spec_has_it(
    tmp_path: Path, cluster: FakeCluster, spec: dict[str, Any], is_excluded: bool
) -> None:
    other = NODE.model_copy(update={"node_id": "other"})
    cluster.nodes = (NODE, other)
    cluster.steps = 80
    cluster.save_every = 40
    cluster.paces = {0: 0.2, 1: 0.9}
    cluster.dies = (0, 70)
    control_plane = FakeControlPlane(
        {**spec, "restart": {"exclude_slow": is_excluded}}, str(tmp_path)
    )
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    excluded = control_plane.events("node.excluded")
    if is_excluded:
        assert cluster.node_of(0).node_id == "other"
        assert "4.5 times as slow as its peers" in only(excluded)["message"]
    else:
        assert cluster.node_of(0).node_id == "node"
        assert excluded == []
