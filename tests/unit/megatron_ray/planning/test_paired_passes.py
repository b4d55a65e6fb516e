"""Plans of passes that are interleaved: memory, idle time and messages."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline
from megatron_ray.planning.activations import kept_by_stage
from megatron_ray.planning.hardware import HARDWARE
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.planning.pipeline import bubble_share, kept_and_released
from megatron_ray.planning.step_time.estimate import step_time

CPU = DeviceKind("cpu", bf16_products=False)


def config(parallel: dict[str, Any], *, overlap: bool) -> TrainConfig:
    layout = {"dp": 16, "ep": 16, "ep_comm_overlap": overlap} | parallel
    return TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 8,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "vocab_size": 1024,
                "moe": {"num_experts": 16, "top_k": 4},
            },
            "data": {"train": [{"path": "/a.txt"}], "tokenizer": {"kind": "bytes"}},
            "parallel": layout,
            "training": {
                "seq_length": 1024,
                "micro_batch_size": 1,
                "global_batch_size": 512,
                "steps": 2,
                "precision": "bf16",
            },
            "optimizer": {"lr": 1e-3},
        }
    )


def activations(given: TrainConfig) -> int:
    return fullest_rank(given, CPU).activations_bytes_estimate


def test_without_a_pipeline_a_second_microbatch_is_kept() -> None:
    plain = config({}, overlap=False)
    (stage,) = plan_pipeline(plain).contents
    more = activations(config({}, overlap=True)) - activations(plain)
    assert more == kept_by_stage(plain, stage, CPU)


@pytest.mark.parametrize(
    ("parallel", "kept"),
    [
        ({"pp": 4}, [8, 6, 4, 2]),
        ({"pp": 4, "vpp": 2}, [12, 10, 8, 6]),
    ],
)
def test_pipelines_keep_more_and_wait_no_longer(
    parallel: dict[str, Any], kept: list[int]
) -> None:
    plain = plan_pipeline(config(parallel, overlap=False))
    pairs = plan_pipeline(config(parallel, overlap=True))
    peaks = []
    for rank in range(4):
        count = 0
        counts = []
        for event in kept_and_released(pairs, 32, rank):
            count += 1 if event > 0 else -1
            counts.append(count)
        peaks.append(max(counts))
    assert peaks == kept
    assert bubble_share(pairs, 32) == pytest.approx(bubble_share(plain, 32))


@pytest.mark.parametrize("parallel", [{}, {"pp": 4}])
def test_messages_of_experts_are_hidden_behind_the_other_pass(
    parallel: dict[str, Any],
) -> None:
    hardware = HARDWARE["H100"]
    plain = step_time(config(parallel, overlap=False), hardware)
    pairs = step_time(config(parallel, overlap=True), hardware)
    assert plain is not None
    assert pairs is not None
    assert pairs.communication_s < 0.2 * plain.communication_s
    assert pairs.products_s == plain.products_s
