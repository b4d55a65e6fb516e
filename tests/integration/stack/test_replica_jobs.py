"""Jobs that are the replica groups of one run: one is cancelled and resumed. The others go
on meanwhile, and it comes back where they are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ray.checkpoint.load import SavedCheckpoint
from megatron_ray.sharding.sharded_state import whole_tensor
from tests.support.fault_injection import history
from tests.support.running_stack import Road

pytestmark = pytest.mark.ray

STEPS = 400
"""So many that a job can end and start again meanwhile."""


def job_spec(road: Road, meeting: Path, group: int) -> dict[str, Any]:
    rendezvous = {"path": str(meeting), "group": group, "start_timeout_s": 120}
    local_sgd = {"groups": 3, "sync_every": 2, "rendezvous": rendezvous}
    return road.spec(
        name=f"group-{group}",
        parallel={
            "tp": 1,
            "dp": 1,
            "sequence_parallel": False,
            "local_sgd": local_sgd,
        },
        training={"steps": STEPS},
        checkpoint={"every_steps": STEPS},
        # All three at once on the two CPUs of the stack.
        resources={"cpus_per_rank": 0.5},
        restart={"standby": False},
    )


def weights(path: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, by name."""
    saved = SavedCheckpoint(path)
    values = {}
    state = {}
    for name, tensor in saved.tensors.items():
        if name.startswith("model/"):
            values[name] = torch.empty(tensor.shape)
            state[name] = whole_tensor(values[name])
    saved.load_into(state)
    return values


def test_the_others_go_on_when_a_job_is_cancelled_and_it_comes_back_when_resumed(
    road: Road, tmp_path: Path
) -> None:
    job_ids = [
        road.client.submit(job_spec(road, tmp_path, group))["id"] for group in range(3)
    ]
    cancelled, *others = job_ids
    road.step(cancelled, 5)
    road.client.cancel(cancelled)
    road.finish(cancelled)
    stopped_at = road.rows(cancelled)[-1]["step"]
    road.client.resume(cancelled)
    road.step(cancelled, stopped_at + 1)
    jobs = [road.finish(job_id) for job_id in job_ids]
    assert [job["status"] for job in jobs] == ["succeeded"] * 3
    for other in others:
        steps = [row["step"] for row in road.rows(other)]
        assert steps == list(range(1, STEPS + 1)), "no step is missed"
        assert [groups for groups, _ in meetings(road, other)] == [
            [0, 1, 2],
            [1, 2],
            [0, 1, 2],
        ]
        assert [level for _, level in meetings(road, other)] == ["info", "warn", "info"]
    own_steps = [row["step"] for row in road.rows(cancelled)]
    first = own_steps[own_steps.index(stopped_at) + 1]
    assert first > stopped_at + 1, "it does not repeat what the others have done"
    assert own_steps[-1] == STEPS
    expected, *rest = [weights(job["last_checkpoint"]["path"]) for job in jobs]
    assert expected
    for own in rest:
        assert own.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(own[name], tensor), name


def meetings(road: Road, job_id: str) -> list[tuple[list[int], str]]:
    """The groups that were there according to each event of a job, and its level."""
    seen = []
    for event in history(road, job_id):
        if event["type"] == "rank.replica_groups":
            seen.append((event["data"]["groups"], event["level"]))
    return seen
