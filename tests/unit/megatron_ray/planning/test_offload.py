"""State in host memory is no part of the device's, and named."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.answers.bodies import plan_body
from megatron_ray.planning.hardware import GPU, HARDWARE
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.planning.step_time.estimate import step_time


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
        "estimate; a node needs it for each of its ranks, and every step copies it to the "
        "device and back"
    )


@pytest.mark.parametrize(
    ("device", "precision", "bandwidth"),
    [("H100", "bf16", 64e9), ("A100", "bf16", 32e9), ("CPU", "fp32", 13e9)],
)
@pytest.mark.parametrize("optimizer", [{}, {"name": "muon"}])
def test_a_step_waits_for_the_copies_there_and_back(
    device: str, precision: str, bandwidth: float, optimizer: dict[str, Any]
) -> None:
    plain = step_time(config(precision, **optimizer), HARDWARE[device])
    settings = config(precision, offload=True, **optimizer)
    offloaded = step_time(settings, HARDWARE[device])
    assert plain is not None
    assert offloaded is not None
    num_bytes = 2 * fullest_rank(settings, HARDWARE[device].device).offloaded_bytes
    seconds = num_bytes / (0.8 * bandwidth)
    assert offloaded.update_s - plain.update_s == pytest.approx(seconds)
    assert offloaded.step_s - plain.step_s == pytest.approx(seconds)


def test_remainders_are_fewer_bytes_to_copy() -> None:
    seconds = []
    for store_param_remainders in (False, True):
        settings = config(
            "bf16", offload=True, store_param_remainders=store_param_remainders
        )
        estimate = step_time(settings, HARDWARE["H100"])
        assert estimate is not None
        seconds.append(estimate.update_s)
    whole, remainders = seconds
    assert remainders < whole
