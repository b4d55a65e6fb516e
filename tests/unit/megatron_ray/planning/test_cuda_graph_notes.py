"""A plan names the memory that replays keep, and devices that record nothing."""

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.answers.bodies import plan_body
from megatron_ray.planning.hardware import GPU, HARDWARE
from megatron_ray.planning.memory import fullest_rank


def config(**training: object) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny", "vocab_size": 256},
            "parallel": {"dp": 2},
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 9, **training},
            "optimizer": {"lr": 0.1},
        }
    )


@pytest.mark.parametrize("hardware", [None, "H100", "CPU"])
def test_what_a_graph_costs_is_noted(hardware: str | None) -> None:
    settings = config(cuda_graph={})
    size = fullest_rank(settings, GPU).activations_bytes_estimate / 2**30
    expected = (
        f"training.cuda_graph: replays keep the {size:.2g} GiB of activations between steps "
        "too; what evaluations and updates allocate comes on top of the memory estimate"
    )
    if hardware == "CPU":
        expected = (
            "training.cuda_graph: CPU records nothing; the same code runs the passes of every "
            "step"
        )
    device = None
    if hardware is not None:
        device = HARDWARE[hardware]
    notes = plan_body(settings, device, fits=None)["notes"]
    assert [note for note in notes if "cuda_graph" in note] == [expected]
    plain = plan_body(config(), device, fits=None)["notes"]
    assert [note for note in plain if "cuda_graph" in note] == []
