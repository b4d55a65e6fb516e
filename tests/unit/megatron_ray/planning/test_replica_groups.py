"""The figures of a plan with replica groups."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.planning.answers.bodies import plan_body
from megatron_ray.planning.hardware import GPU
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.validation.storage.disk_space import checkpoint_bytes
from tests.unit.megatron_ray.planning.test_peer_copies import config

MIB = 2**20


def in_groups(**fields: Any) -> TrainConfig:
    local_sgd = {"groups": 2, "sync_every": 4} | fields
    return config(None, dp=4, local_sgd=local_sgd)


def test_a_plan_has_the_bytes_between_groups() -> None:
    weights = checkpoint_bytes(config(None, dp=2)) / 3
    moments = {"exp_avg": 8, "exp_avg_sq": 16}
    plan = plan_body(in_groups(sync_moments_every=moments), None, fits=None)
    (note,) = [note for note in plan["notes"] if "local_sgd" in note]
    # ZeRO-1 spreads them over the two replicas of a group.
    size = weights / 2 * (1 / 4 + 1 / 8 + 1 / 16) / MIB
    assert note.startswith("parallel.local_sgd: a rank averages up to ")
    assert float(note.split()[6]) == pytest.approx(size, rel=0.02)
    sent = {entry["axis"]: entry["bytes"] for entry in plan["communication"]}
    assert sent["sync"] == sent["world"] < 200, "the numbers of a step"
    plain = plan_body(config(None, dp=4), None, fits=None)
    assert not [note for note in plain["notes"] if "local_sgd" in note]


def test_a_plan_has_the_memory_for_groups_that_are_jobs() -> None:
    rendezvous = {"path": "/meeting", "group": 0}
    plan = plan_body(in_groups(rendezvous=rendezvous), None, fits=None)
    _, note = [note for note in plan["notes"] if "local_sgd" in note]
    # ZeRO-1 spreads weights and two moments over the four replicas of the job.
    weights = checkpoint_bytes(config(None, dp=4)) / 3 / 4 / MIB
    kept, state = [float(part.split()[-1]) for part in note.split(" MiB")[:2]]
    assert kept == pytest.approx(weights, rel=0.02)
    assert state == pytest.approx(3 * weights, rel=0.02)
    assert "on the device, when there are no activations" in note


def test_checkpoints_have_the_state_of_every_group_and_one_outer_one() -> None:
    one = checkpoint_bytes(config(None, dp=4))
    assert checkpoint_bytes(in_groups()) == 2 * one
    assert checkpoint_bytes(in_groups(outer_optimizer={})) == 2 * one + one * 2 // 3
    plain = {"momentum": 0}
    assert checkpoint_bytes(in_groups(outer_optimizer=plain)) == 2 * one + one // 3


def test_memory_is_that_of_one_group_by_itself() -> None:
    grouped = fullest_rank(in_groups(), GPU)
    alone = fullest_rank(config(None, dp=2), GPU)
    assert grouped.optimizer_bytes == alone.optimizer_bytes
    dims = ParallelDims.of(in_groups().parallel)
    assert dims.replica_group_index(grouped.rank) == 0
