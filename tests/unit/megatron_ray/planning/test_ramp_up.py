"""Plans of a run whose batch grows."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.hardware import HARDWARE
from megatron_ray.planning.memory import fullest_rank


def memory(batch: int, rampup: dict[str, Any] | None, **parallel: Any) -> int:
    config = TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny", "vocab_size": 256},
            "parallel": {"dp": 1, "pp": 4, **parallel},
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "seq_length": 64,
                "global_batch_size": batch,
                "steps": 9,
                "rampup_batch_size": rampup,
            },
            "optimizer": {"lr": 1e-3},
        }
    )
    return fullest_rank(config, HARDWARE["H100"].device).total_bytes


@pytest.mark.parametrize(
    "parallel", [{}, {"vpp": 2, "layout": "E|t|t|t|t|||L"}], ids=["1f1b", "interleaved"]
)
def test_memory_is_that_of_the_batch_with_most_activations(parallel: Any) -> None:
    # 7 microbatches are one group of an interleaved pipeline of 4 ranks.
    growing = memory(16, {"start": 7, "increment": 9, "samples": 70}, **parallel)
    full = memory(16, None, **parallel)
    small = memory(7, None, **parallel)
    assert growing == max(small, full)
    assert (small > full) is bool(parallel)
