"""What muP promises: activations that move alike in all widths, and a rate that fits them all."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import Report, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.coordinate_check import FLAT, check_coordinates
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.session import batch_maker, build, no_command
from tests.support.parity import NoSaver, RandomDataset

RATES = [2.0**-power for power in range(11, 3, -1)]
STEPS = 60
VOCABULARY = 97


def test_activations_move_alike_in_all_widths_under_mup_alone() -> None:
    fields = {"model": {"preset": "gpt-tiny", "num_layers": 2}, "optimizer": {"lr": 2e-3}}
    check = check_coordinates(fields, [128, 32, 64], steps=3, seeds=1)
    assert check.widths == (32, 64, 128)
    names = ["embedding", "layers.0", "layers.1", "final_norm", "logits"]
    assert [coordinate.name for coordinate in check.mup] == names
    # The narrowest is the base model, where both are the same.
    for mup, standard in zip(check.mup, check.standard, strict=True):
        assert mup.changes[0] == standard.changes[0]
    assert check.is_flat
    growths = {coordinate.name: coordinate.growth for coordinate in check.standard}
    assert min(growths["layers.1"], growths["logits"]) > 1.5 * FLAT


def test_experts_are_widened_too() -> None:
    model = {"preset": "moe-tiny", "num_layers": 1, "num_attention_heads": 8}
    model |= {"num_query_groups": 1}
    # What depends on a run's length or on its layers is left out.
    optimizer = {"lr": 1e-3, "name": "adopt", "switches": [{"step": 9, "lr": 1.0}]}
    optimizer |= {"weight_decay_schedule": {"end": 0.1}, "freeze": ["layers.5.*"]}
    fields = {"model": model, "optimizer": optimizer}
    # ADOPT's first step changes nothing.
    with pytest.raises(ValueError, match="embedding does not change; check more steps"):
        check_coordinates(fields, [32, 64], steps=1, seeds=1)
    check = check_coordinates(fields, [32, 64], steps=2, seeds=1)
    assert len(check.mup) == 4


@pytest.mark.parametrize(
    ("model", "widths", "message"),
    [
        ({"preset": "gpt-tiny"}, [64, 72], "width 72 is no multiple of 16"),
        ({"preset": "deepseek-tiny"}, [32, 64], "models with mla cannot be checked"),
    ],
)
def test_what_cannot_be_widened_is_refused(
    model: dict[str, Any], widths: list[int], message: str
) -> None:
    fields = {"model": model, "optimizer": {"lr": 1e-3}}
    with pytest.raises(ValueError, match=message):
        check_coordinates(fields, widths, steps=1, seeds=1)


def last_loss(width: int, lr: float, mup: dict[str, int] | None) -> float:
    config = TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": width,
                "num_attention_heads": width // 16,
                "vocab_size": VOCABULARY,
                "mup": mup,
            },
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "seq_length": 32,
                "micro_batch_size": 16,
                "global_batch_size": 16,
                "steps": STEPS,
            },
            "optimizer": {"lr": lr},
            "schedule": {"kind": "linear", "warmup_steps": 5},
        }
    )
    mesh = ParallelMesh.single()
    model, optimizer = build(config, mesh)
    dataset = RandomDataset(VOCABULARY, 32)
    loader = StepLoader(dataset, 16, 16, 0, 1, batch_maker(config, mesh))
    losses: list[float] = []

    def note(report: Report) -> None:
        assert isinstance(report, StepReport)
        losses.append(report.loss)

    components = TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())
    train(components, Progress(), note, no_command)
    return sum(losses[-10:]) / 10


def best_rate(width: int, mup: dict[str, int] | None) -> int:
    losses = [last_loss(width, rate, mup) for rate in RATES]
    return losses.index(min(losses))


@pytest.mark.parity
def test_the_best_rate_of_a_narrow_model_is_that_of_a_wide_one() -> None:
    narrow = best_rate(64, None)
    assert 0 < narrow < len(RATES) - 1
    wide = best_rate(256, {"base_hidden_size": 64})
    # Rates are a factor 2 apart.
    assert abs(wide - narrow) <= 1
    assert best_rate(256, None) < wide
