"""Suggestions are legal, fit, and come in the order of their time."""

import time
from dataclasses import replace
from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import RecomputeConfig
from megatron_ray.planning.hardware import HARDWARE
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.planning.step_time.estimate import step_time
from megatron_ray.planning.suggest import nearest, suggest
from megatron_ray.validation import check, resolution

H100 = HARDWARE["H100"]
MOE = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "ffn_hidden_size": 8192,
    "vocab_size": 32000,
}


def config(model: dict[str, Any], *, batch: int = 256, **parallel: Any) -> TrainConfig:
    fields = {
        "model": model,
        "parallel": parallel,
        "data": {"train": [{"path": "unused"}]},
        "training": {
            "seq_length": 4096,
            "global_batch_size": batch,
            "steps": 1,
            "precision": "bf16",
        },
        "optimizer": {"lr": 1e-4},
    }
    return TrainConfig.from_mapping(fields)


MODELS: dict[str, dict[str, Any]] = {
    "dense": {"preset": "llama3-8b"},
    "experts": MOE | {"moe": {"num_experts": 8, "top_k": 2}},
    "latent": {"preset": "deepseek-v2-lite"},
    "mtp": {"preset": "llama3-8b", "num_layers": 31, "mtp": {}},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_suggestions_are_legal_fit_and_are_in_order(model: dict[str, Any]) -> None:
    suggestions = suggest(config(model), 32, H100, most=5)
    assert len(suggestions) == 5
    for suggestion in suggestions:
        assert check.find_problems(suggestion.config, 32) == []
        assert resolution.world_size(suggestion.config) == 32
        assert fullest_rank(suggestion.config, H100.device) == suggestion.memory
        assert H100.memory_bytes is not None
        assert suggestion.memory.total_bytes <= H100.memory_bytes
        assert step_time(suggestion.config, H100) == suggestion.time
    steps = [suggestion.time.step_s for suggestion in suggestions]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    "model", [MODELS["dense"], MODELS["dense"] | {"mtp": {}}], ids=["dense", "mtp"]
)
def test_none_is_missed_by_looking_at_the_most_promising_first(
    model: dict[str, Any],
) -> None:
    quick, all_of_them = (
        suggest(config(model, batch=64), 16, H100, most=most) for most in (3, 10_000)
    )
    assert [one.time for one in quick] == [one.time for one in all_of_them[:3]]
    assert len(all_of_them) > 10


def test_405b_on_1024_devices_takes_seconds_at_most_and_stays_inside_nodes() -> None:
    start = time.process_time()
    suggestions = suggest(config({"preset": "llama3-405b"}, batch=1536), 1024, H100)
    assert time.process_time() - start < 8  # 2 where nothing else runs
    assert suggestions
    assert all(
        suggestion.config.parallel.tp <= 8 and suggestion.config.parallel.pp > 1
        for suggestion in suggestions
    )


def test_outputs_of_operations_are_kept_where_layers_need_not_be_recomputed_whole() -> None:
    (best,) = suggest(config({"preset": "llama3-70b"}, batch=128), 16, H100, most=1)
    assert best.config.training.recompute.granularity == "operations"
    assert best.changes["training.recompute"] == {
        "granularity": "operations",
        "save": ("attention",),
    }
    assert H100.memory_bytes is not None
    for recompute, fits in [
        (RecomputeConfig(granularity="selective", modules=("norm", "activation")), False),
        (RecomputeConfig(granularity="operations", every=2), False),
        (RecomputeConfig(granularity="operations", every=3), False),
        (RecomputeConfig(granularity="full", method="uniform", num_layers=1), True),
    ]:
        training = best.config.training.model_copy(update={"recompute": recompute})
        other = best.config.model_copy(update={"training": training})
        memory = fullest_rank(other, H100.device)
        assert (memory.total_bytes <= H100.memory_bytes) == fits
        estimate = step_time(other, H100)
        assert estimate is not None
        assert (estimate.step_s > best.time.step_s) == fits


def test_mtp_layers_are_part_of_a_layout_of_uneven_stages() -> None:
    suggestion = nearest(
        config({"preset": "llama3-8b", "num_layers": 29, "mtp": {}}, tp=8, pp=4), 32, H100
    )
    assert suggestion is not None
    assert suggestion.config.parallel.layout == "Ettttttt|(tttttttt|)*2ttttttmL"


def test_the_nearest_layout_changes_as_little_as_possible() -> None:
    same = nearest(
        config({"preset": "llama3-70b"}, tp=8, dp=8, sequence_parallel=True), 64, H100
    )
    other = nearest(
        config({"preset": "llama3-70b"}, tp=4, dp=16, sequence_parallel=True), 64, H100
    )
    assert same is not None
    assert other is not None
    degrees = [
        [
            getattr(suggestion.config.parallel, axis)
            for axis in ("tp", "pp", "vpp", "cp", "ep")
        ]
        for suggestion in (same, other)
    ]
    assert degrees[0] == [8, 1, 1, 1, 1]
    assert (
        sum(size != given for size, given in zip(degrees[1], [4, 1, 1, 1, 1], strict=True))
        == 1
    )
    assert nearest(config({"preset": "llama3-405b"}), 8, H100) is None


def test_what_cannot_be_estimated_is_not_suggested() -> None:
    assert suggest(config({"preset": "llama3-8b"}), 8, replace(H100, efficiencies={})) == []
    assert suggest(config({"preset": "llama3-8b"}), 8, HARDWARE["CPU"]) != []
