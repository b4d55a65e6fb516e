"""The bytes that checkpoints need, compared with the free space."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.parameters import logical_parameters
from megatron_ray.validation.storage.disk_space import (
    checkpoint_bytes,
    num_checkpoints,
    space_problems,
)


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": {"preset": "gpt-tiny", "vocab_size": 300},
        "data": {"train": [{"path": "/a.txt"}], "tokenizer": {"kind": "bytes"}},
        "training": {"seq_length": 64, "global_batch_size": 8, "steps": 100},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every_steps": 10, "keep_last": 2},
    }
    for name, fields in changes.items():
        values[name] = {**values.get(name, {}), **fields}
    return TrainConfig.from_mapping(values)


def test_frozen_parameters_have_no_moments_and_the_models_precision() -> None:
    whole = checkpoint_bytes(config())
    frozen = config(optimizer={"freeze": ["*"]})
    assert checkpoint_bytes(frozen) * 3 == whole
    halved = config(optimizer={"freeze": ["*"]}, training={"precision": "bf16"})
    assert checkpoint_bytes(halved) * 6 == whole
    assert checkpoint_bytes(config(training={"precision": "bf16"})) == whole


def test_matrices_of_muon_have_one_moment() -> None:
    whole = checkpoint_bytes(config())
    muon = config(optimizer={"name": "muon"})
    matrices = sum(
        parameter.num_elements
        for parameter in logical_parameters(muon.model)
        if parameter.is_matrix
    )
    assert checkpoint_bytes(muon) == whole - 4 * matrices


def test_an_unknown_vocabulary_counts_as_small_as_it_can_be() -> None:
    known = checkpoint_bytes(config(model={"vocab_size": 257}))
    assert checkpoint_bytes(config(model={"vocab_size": None})) == known
    trained = config(model={"vocab_size": None}, data={"tokenizer": {"kind": "bpe"}})
    assert checkpoint_bytes(trained) < known


@pytest.mark.parametrize(
    ("checkpoint", "count"),
    [
        ({"every_steps": 10, "keep_last": 2}, 3),
        ({"every_steps": 60, "keep_last": 9}, 2),
        ({"every_steps": None}, 1),
        ({"every_steps": 100}, 1),
    ],
)
def test_one_more_than_are_kept_but_no_more_than_are_written(
    checkpoint: dict[str, Any], count: int
) -> None:
    assert num_checkpoints(config(checkpoint=checkpoint)) == count
    epochs = config(checkpoint=checkpoint, training={"steps": None, "epochs": 2})
    assert num_checkpoints(epochs) >= count


def test_a_problem_has_both_numbers_and_the_remedies() -> None:
    one = checkpoint_bytes(config())
    assert space_problems(config(), "/runs/a", None) == []
    assert space_problems(config(), "/runs/a", 3 * one) == []
    # Later checkpoints replace the run's own earlier ones.
    assert space_problems(config(), "/runs/a", one, 2 * one) == []
    (problem,) = space_problems(config(), "/runs/a", 3 * one - 1)
    assert problem.pointer == "/storage/path"
    assert f"/runs/a has {(3 * one - 1) / 1e6:,.1f} MB free" in problem.detail
    assert f"3 checkpoints of {one / 1e6:,.1f} MB each need" in problem.detail
    assert "lower checkpoint.keep_last" in problem.detail
