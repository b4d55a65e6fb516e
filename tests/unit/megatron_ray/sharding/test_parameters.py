"""The parameter table: boxes of all ranks tile every logical tensor exactly."""

from typing import Any

import numpy as np
import pytest

from megatron_ray.config.model import ModelConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.layout import parse_layout
from megatron_ray.planning.flops import flops_per_token, matmul_parameters
from megatron_ray.sharding.parameters import (
    local_parameters,
    logical_parameters,
    padded_vocabulary,
)

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
        "vocab_size": 259,
    },
    "gpt2": {"preset": "gpt2-tiny", "vocab_size": 1000},
    "latent": {"preset": "deepseek-tiny", "moe": None, "vocab_size": 1000},
    "latent-tied": {
        "preset": "deepseek-tiny",
        "moe": None,
        "vocab_size": 1000,
        "tie_embeddings": True,
        "mtp": {"num_layers": 2},
    },
    "qwen3": {"preset": "qwen3-tiny", "vocab_size": 1000, "qkv_bias": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_boxes_cover_each_logical_tensor_once_per_replica(shape: str, tp: int) -> None:
    model = ModelConfig.model_validate(SHAPES[shape])
    dims = ParallelDims(tp=tp)
    covered = {
        parameter.name: np.zeros(parameter.shape, dtype=int)
        for parameter in logical_parameters(model)
    }
    for rank in range(tp):
        for local in local_parameters(model, dims, rank):
            rows = 0
            for part in local.parts:
                where = tuple(
                    slice(start, start + size)
                    for start, size in zip(part.box.offset, part.box.size, strict=True)
                )
                covered[part.logical.name][where] += 1
                assert part.start == rows
                rows += part.box.size[0]
            assert rows <= local.shape[0]
    for parameter in logical_parameters(model):
        expected = 1 if parameter.shard_dim is not None else tp
        assert (covered[parameter.name] == expected).all(), parameter.name


@pytest.mark.parametrize("shape", SHAPES)
def test_stages_hold_each_layer_once_and_an_embedding_that_the_last_needs_twice(
    shape: str,
) -> None:
    model = ModelConfig.model_validate(SHAPES[shape])
    layout = "E|" + "t|" * model.num_layers + "m" * model.num_mtp_layers + "L"
    stages = parse_layout(layout, model.num_layers, model.num_mtp_layers)
    dims = ParallelDims(pp=len(stages))
    on_all_stages = [
        local
        for rank, stage in enumerate(stages)
        for local in local_parameters(model, dims, rank, stages=[stage])
    ]
    names = [part.logical.name for local in on_all_stages for part in local.parts]
    further = model.num_mtp_layers > 0
    needed = model.tie_embeddings or model.num_mtp_layers > 0
    expected = [parameter.name for parameter in logical_parameters(model)] + (
        ["embedding.weight"] if needed else []
    )
    assert sorted(names) == sorted(expected)
    twice = [local.name for local in on_all_stages if local.is_shared_embedding]
    assert twice == (
        ["embedding.weight", "embedding.weight" if further else "head.weight"]
        if needed
        else []
    )
    assert [local.name for local in on_all_stages if not local.owns_norm] == twice[1:]


MIXTURE = SHAPES["llama"] | {
    "moe": {
        "num_experts": 4,
        "ffn_hidden_size": 48,
        "shared_expert_ffn_hidden_size": 32,
        "layer_pattern": [0, 1],
    }
}


@pytest.mark.parametrize(
    "dims",
    [
        ParallelDims(dp=2, ep=2),
        ParallelDims(tp=2, dp=4, ep=2),
        ParallelDims(tp=2, dp=2, ep=4, etp=1),
        ParallelDims(dp=4, ep=2, etp=2),
        ParallelDims(cp=2, ep=2),
    ],
    ids=str,
)
def test_experts_lie_in_a_grid_of_their_own(dims: ParallelDims) -> None:
    model = ModelConfig.model_validate(MIXTURE)
    logical = {parameter.name: parameter for parameter in logical_parameters(model)}
    assert [name for name in logical if name.startswith("layers.1.moe")][:4] == [
        "layers.1.moe.router.weight",
        "layers.1.moe.experts.0.gate.weight",
        "layers.1.moe.experts.0.up.weight",
        "layers.1.moe.experts.1.gate.weight",
    ]
    assert "layers.0.mlp.up.weight" in logical
    assert "layers.1.moe.shared.down.weight" in logical
    covered = {
        name: np.zeros(parameter.shape, dtype=int) for name, parameter in logical.items()
    }
    for rank in range(dims.world_size):
        for local in local_parameters(model, dims, rank, sequence_parallel=True):
            assert local.of_expert == (".experts." in local.name)
            for part in local.parts:
                where = tuple(
                    slice(start, start + size)
                    for start, size in zip(part.box.offset, part.box.size, strict=True)
                )
                covered[part.logical.name][where] += 1
    for name, parameter in logical.items():
        replicas = (
            dims.expert_dp
            if parameter.of_expert
            else dims.size("dp", "cp") * (dims.tp if parameter.shard_dim is None else 1)
        )
        assert (covered[name] == replicas).all(), name


def test_sizes_of_published_models() -> None:
    total = sum(
        p.num_elements
        for p in logical_parameters(ModelConfig.model_validate({"preset": "gpt2-124m"}))
    )
    assert total == 124_439_808
    total = sum(
        p.num_elements
        for p in logical_parameters(ModelConfig.model_validate({"preset": "llama3-8b"}))
    )
    assert total == 8_030_261_248


def test_the_sizes_of_deepseek_v3() -> None:
    """As its authors count: 671B of the model, 36.7B of them used by a token, and 14B
    of the prediction of a further token, its own copies of embedding and head among
    them.
    """
    model = ModelConfig.model_validate({"preset": "deepseek-v3"})
    sizes = {p.name: p.num_elements for p in logical_parameters(model)}
    further = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    assert sum(sizes.values()) - further == 671_026_404_352
    assert further == 11_610_067_968
    assert 13.4e9 < further + 2 * sizes["embedding.weight"] < 14e9
    alone = ModelConfig.model_validate({"preset": "deepseek-v3", "mtp": None})
    assert matmul_parameters(alone) == pytest.approx(36.7e9, rel=5e-3)
    # Two latents, the projection, a layer's nine experts and the head once more.
    assert matmul_parameters(model) - matmul_parameters(alone) == (
        7168 * (1536 + 512 + 64)
        + 128 * (1536 * 192 + 512 * 256 + 128 * 7168)
        + 7168 * (2 * 7168 + 3 * 9 * 2048 + 256 + 129280)
    )
    assert (
        flops_per_token(model, 4096)
        == 6 * matmul_parameters(model) + 6 * 62 * 128 * (192 + 128) * 4096
    )


def test_vocabulary_is_padded_to_a_multiple_times_tp() -> None:
    model = ModelConfig.model_validate(SHAPES["llama"])
    assert [padded_vocabulary(model, tp) for tp in (1, 2, 4)] == [384, 512, 512]
    (embedding,) = [
        p
        for p in local_parameters(model, ParallelDims(tp=4), 3)
        if p.name == "embedding.weight"
    ]
    assert embedding.parts[0].box.size == (0, 64)


def test_a_degree_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match="4 experts 48 wide do not divide by ep=3 and etp=1"
    ):
        local_parameters(ModelConfig.model_validate(MIXTURE), ParallelDims(dp=3, ep=3), 0)
    with pytest.raises(ValueError, match=r"attention\.q: 64 is not divisible by tp=3"):
        local_parameters(ModelConfig.model_validate(SHAPES["llama"]), ParallelDims(tp=3), 0)


def test_a_token_is_multiplied_with_its_own_experts_only() -> None:
    model = ModelConfig.model_validate(MIXTURE)
    dense = 3 * 96
    experts = 2 * 3 * 48 + 3 * 32
    attention = 2 * 8 + 2 * 4
    assert matmul_parameters(model) == 64 * (2 * attention * 8 + dense + experts + 4 + 259)


def test_flops_of_the_reference_model() -> None:
    model = ModelConfig.model_validate(
        {
            "num_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "ffn_hidden_size": 768,
            "vocab_size": 8192,
        }
    )
    assert matmul_parameters(model) == 5_505_024
    assert flops_per_token(model, 256) == 6 * 5_505_024 + 12 * 4 * 256 * 256
