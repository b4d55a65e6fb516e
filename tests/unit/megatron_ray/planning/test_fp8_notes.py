"""A plan names the devices that do not multiply in FP8, and what they can do instead."""

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.answers.bodies import plan_body
from megatron_ray.planning.hardware import HARDWARE
from megatron_ray.validation.resolution import resolve


@pytest.mark.parametrize(
    ("hardware", "recipe", "words"),
    [
        ("H100", "delayed", None),
        ("H100", "mxfp8", "for speed set training.fp8.recipe to current"),
        ("B200", "mxfp8", None),
        ("A100", "current", "leave training.fp8 out for speed"),
        ("CPU", "blockwise", "CPU does not multiply in FP8 with recipe=blockwise: the "),
    ],
)
def test_products_that_are_emulated_are_noted(
    hardware: str, recipe: str, words: str | None
) -> None:
    config = TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "unused"}], "tokenizer": {"kind": "bytes"}},
            "training": {
                "seq_length": 128,
                "global_batch_size": 1,
                "steps": 1,
                "precision": "bf16",
                "fp8": {"recipe": recipe},
            },
            "optimizer": {"lr": 1e-3},
        }
    )
    plan = plan_body(resolve(config, 1), HARDWARE[hardware], fits=None)
    notes = [note for note in plan["notes"] if "FP8" in note]
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]
    assert plan["time"] is not None
