"""State in host memory is no part of the device's, and named."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.answers.bodies import plan_body
from megatron_ray.planning.hardware import GPU
from megatron_ray.planning.memory import fullest_rank


def config(precision: str, **optimizer: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny", "vocab_size": 256},
            "parallel": {"dp": 2},
            "data": {"train": [{"path": "x"}]},
            "training": {
                "seq_length": 8,
                "global_batch_size": 8,
                "steps": 9,
                "precision": precision,
            },
            "optimizer": {"lr": 0.1, **optimizer},
        }
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_leaves_the_device_is_in_host_memory(precision: str) -> None:
    plain = fullest_rank(config(precision), GPU)
    offloaded = fullest_rank(config(precision, offload=True), GPU)
    assert (plain.offloaded_bytes, offloaded.optimizer_bytes) == (0, 0)
    assert offloaded.offloaded_bytes == plain.optimizer_bytes
    assert offloaded.total_bytes == plain.total_bytes - plain.optimizer_bytes


def test_a_plan_names_the_host_memory() -> None:
    settings = config("bf16", offload=True)
    size = fullest_rank(settings, GPU).offloaded_bytes / 2**30
    (note,) = [
        note
        for note in plan_body(settings, None, fits=None)["notes"]
        if "optimizer.offload" in note
    ]
    assert note == (
        f"optimizer.offload: {size:.2g} GiB of host memory per rank, outside of the memory "
        "estimate; a node needs it for each of its ranks, and the time of the copies is not "
        "estimated"
    )
