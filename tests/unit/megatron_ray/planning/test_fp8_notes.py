"""A plan names the devices that do not multiply in FP8, or do not run Transformer Engine, and
what they can do instead.
"""

from typing import Any

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
    plan = planned(hardware, "local", recipe)
    notes = [note for note in plan["notes"] if "FP8" in note]
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]
    assert plan["time"] is not None


@pytest.mark.parametrize(
    ("hardware", "recipe", "note"),
    [
        ("H100", "blockwise", None),
        (
            "CPU",
            "current",
            "CPU does not run transformer_engine, and no rank starts there; set model.spec to "
            "local",
        ),
        (
            "A100",
            "current",
            "A100 does not multiply in FP8 with recipe=current, which transformer_engine does "
            "not emulate, and no rank starts there; use another recipe, or set model.spec to "
            "local",
        ),
    ],
)
def test_devices_without_the_kernels_of_transformer_engine_are_noted(
    hardware: str, recipe: str, note: str | None
) -> None:
    notes = planned(hardware, "transformer_engine", recipe)["notes"]
    assert [each for each in notes if "transformer_engine" in each] == [note] * bool(note)


def planned(hardware: str, spec: str, recipe: str) -> Any:
    config = TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny", "spec": spec},
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
    return plan_body(resolve(config, 1), HARDWARE[hardware], fits=None)
