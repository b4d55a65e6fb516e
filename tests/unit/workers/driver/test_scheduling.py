"""The placement of an attempt when the nodes that may be used change."""

from pathlib import Path

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

NODES = tuple(
    NODE.model_copy(update={"node_id": f"node-{number}", "address": f"10.0.0.{number}"})
    for number in range(2)
)


def test_an_attempt_leaves_a_node_that_must_be_avoided(tmp_path: Path) -> None:
    spec = {
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": 2, "dp": 2},
        "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
        "training": {"seq_length": 16, "global_batch_size": 4, "steps": 20},
        "optimizer": {"lr": 0.001},
        "storage": {"path": str(tmp_path)},
    }
    control_plane = FakeControlPlane(spec, str(tmp_path))
    cluster = FakeCluster(steps=20, save_every=5, nodes=NODES, dies=(1, 8))

    def on_step(process: FakeProcess) -> None:
        assert control_plane.desired is not None
        # The service learns of it while the ranks run, and nothing happens to them.
        if process.step == 6:
            update = {"avoid_nodes": {"node-0": "ECC errors"}}
            control_plane.desired = control_plane.desired.model_copy(update=update)

    cluster.on_step = on_step
    JobLifecycle(
        JOB_ID, str(tmp_path), fake_ports(cluster, control_plane, str(tmp_path))
    ).run()
    assert control_plane.state is JobState.SUCCEEDED
    first, second = [record.data["ranks"] for record in control_plane.of_kind("ranks")]
    assert [row["node_id"] for row in first] == ["node-0", "node-0", "node-1", "node-1"]
    assert [row["node_id"] for row in second] == ["node-1"] * 4
    (event,) = control_plane.events("placement.moved")
    assert event.data["message"] == (
        "the resources are requested anew: node 10.0.0.0 is excluded: ECC errors"
    )
