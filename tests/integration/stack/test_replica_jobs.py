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

SAVED_EVERY = 50


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
        # So many that a job can end and start again meanwhile; all are cancelled.
        training={"steps": 1_000_000},
        checkpoint={"every_steps": SAVED_EVERY},
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
    for other in others:
        road.step(other, stopped_at + 10)
    road.client.resume(cancelled)
    back_at = road.step(cancelled, stopped_at + 1)["progress"]["step"]
    for job_id in job_ids:
        road.step(job_id, back_at + 2 * SAVED_EVERY)
    for job_id in job_ids:
        road.client.cancel(job_id)
    for job_id in job_ids:
        road.finish(job_id)
    for other in others:
        steps = [row["step"] for row in road.rows(other)]
        assert steps == list(range(1, steps[-1] + 1)), "no step is missed"
        assert meetings(road, other)[:3] == [
            ([0, 1, 2], "info"),
            ([1, 2], "warn"),
            ([0, 1, 2], "info"),
        ]
    own_steps = [row["step"] for row in road.rows(cancelled)]
    first = own_steps[own_steps.index(stopped_at) + 1]
    assert first > stopped_at + 10, "it does not repeat what the others have done"
    assert own_steps == [
        *range(1, stopped_at + 1),
        *range(first, own_steps[-1] + 1),
    ]
    expected, *rest = [weights(path) for path in common_checkpoints(road, job_ids, first)]
    assert expected
    for own in rest:
        assert own.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(own[name], tensor), name


def common_checkpoints(road: Road, job_ids: list[str], after: int) -> list[str]:
    """Paths of the jobs' checkpoints of the newest step of which all have one."""
    paths = []
    for job_id in job_ids:
        entries = road.client.checkpoints(job_id)["data"]
        paths.append({entry["step"]: entry["path"] for entry in entries})
    common = set.intersection(*(set(own) for own in paths))
    newest = max(step for step in common if step % SAVED_EVERY == 0)
    assert newest >= after
    return [own[newest] for own in paths]


def meetings(road: Road, job_id: str) -> list[tuple[list[int], str]]:
    """The groups that were there according to each event of a job, and its level."""
    seen = []
    for event in history(road, job_id):
        if event["type"] == "rank.replica_groups":
            seen.append((event["data"]["groups"], event["level"]))
    return seen
