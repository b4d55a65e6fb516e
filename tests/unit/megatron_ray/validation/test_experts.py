"""Passes that are interleaved because of experts: where they are legal."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.check import find_problems


def config(parallel: dict[str, Any], training: dict[str, Any] | None = None) -> TrainConfig:
    layout = {"dp": 4, "ep": 2, "ep_comm_overlap": True} | parallel
    sizes = {"seq_length": 64, "micro_batch_size": 1, "global_batch_size": 16, "steps": 2}
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny", "moe": {"num_experts": 4}},
            "data": {"train": [{"path": "/a.txt"}], "tokenizer": {"kind": "bytes"}},
            "parallel": layout,
            "training": sizes | (training or {}),
            "optimizer": {"lr": 1e-3},
        }
    )


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"schedule": "1f1b"},
        {"pp": 2},
        {"pp": 2, "vpp": 2, "layout": "Et|t|t|tL"},
        {"dp": "auto"},
        # Without effect, beside what it excludes.
        {"ep": 1, "zero": 3, "dispatcher": "allgather"},
    ],
)
def test_where_passes_can_be_interleaved(parallel: dict[str, Any]) -> None:
    assert find_problems(config(parallel)) == []


@pytest.mark.parametrize(
    ("parallel", "training", "code", "words"),
    [
        (
            {"dispatcher": "allgather"},
            {},
            "overlap_needs_alltoall",
            "ep_comm_overlap computes while an all-to-all is under way, and "
            "dispatcher=allgather has none; use alltoall, or leave ep_comm_overlap out",
        ),
        (
            {"pp": 2, "schedule": "zb-h1"},
            {},
            "overlap_needs_pairs",
            "ep_comm_overlap interleaves the forward pass of a microbatch with the backward "
            "pass of another, and schedule=zb-h1 has no such pairs; use 1f1b, or "
            "interleaved with vpp > 1, or leave ep_comm_overlap out",
        ),
        (
            {"zero": 3},
            {},
            "overlap_excludes_zero3",
            "ep_comm_overlap runs two passes through a layer at once, and zero=3 frees the "
            "gathered weights at the end of each; use zero=1, or leave ep_comm_overlap out",
        ),
        (
            {},
            {"micro_batch_size": 4},
            "overlap_needs_microbatches",
            "ep_comm_overlap needs two microbatches in a step, and global_batch_size=16 is "
            "one of dp x micro_batch_size = 16 samples; use at least 32, or leave "
            "ep_comm_overlap out",
        ),
    ],
)
def test_where_they_cannot(
    parallel: dict[str, Any], training: dict[str, Any], code: str, words: str
) -> None:
    (problem,) = find_problems(config(parallel, training))
    assert problem.pointer == "/parallel/ep_comm_overlap"
    assert problem.code == code
    assert problem.detail == words
