"""Recomputation on real ranks: under every layout the gradients are, to the bit, those
of the same layout without it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.planning.activations import kept_activations
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.activations import kept_bytes
from tests.support.parity import GPT2, LLAMA, RandomDataset, make_config, make_mesh
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

# in fp32, of which both kinds keep the same
CPU = DeviceKind("cpu", bf16_products=False)
SETTINGS: list[dict[str, Any]] = [
    {"granularity": "full", "method": "uniform", "num_layers": 1},
    {"granularity": "full", "method": "block", "num_layers": 1},
    {"granularity": "selective", "modules": ["core_attention", "norm", "activation"]},
    {"granularity": "selective", "modules": ["norm", "mlp", "moe"]},
    {"granularity": "operations"},
    {"granularity": "operations", "save": ["products", "all_to_all"], "every": 1},
]
PERI_NORM = {"peri_norm": True, "embedding_norm": True, "attention_scale": 0.2}
MODELS = {
    "llama": LLAMA | {"num_layers": 4},
    "gpt2": GPT2 | {"num_layers": 4},
    "peri-norm": LLAMA | {"num_layers": 4} | PERI_NORM,
}
DEEPSEEK = {
    "preset": "deepseek-tiny",
    "vocab_size": 259,
    "mla": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "mtp": {"num_layers": 2},
}
EXPERTS = {
    "num_experts": 4,
    "ffn_hidden_size": 48,
    "aux_loss_coeff": 0.01,
    "score_function": "sigmoid",
    "expert_bias": True,
}


def gradients(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Tensor]:
    """Reduced gradients of the first step, by config."""
    return [_gradients(rank, world_size, config) for config in configs]


def _gradients(rank: int, world_size: int, config: TrainConfig) -> Tensor:
    mesh = make_mesh(rank, world_size, config)
    training = config.training
    model, optimizer = build(config, mesh)
    dataset = RandomDataset(config.model.vocabulary, training.seq_length)
    loader = StepLoader(
        dataset,
        training.micro_batch_size,
        training.global_batch_size,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh),
    )
    batches = loader.step(0)
    loss = forward_backward(model, mesh, batches)
    reduce_step(model, optimizer, mesh, loss, sum(batch.num_tokens for batch in batches))
    return torch.cat(
        [
            box.tensor.detach().flatten().clone()
            for entry in optimizer.sharded_gradients().values()
            for box in entry.boxes
        ]
    )


def with_recompute(config: TrainConfig, recompute: dict[str, Any]) -> TrainConfig:
    fields = config.model_dump()
    fields["training"]["recompute"] = recompute
    return TrainConfig.from_mapping(fields)


def compare(model: str, parallel: dict[str, Any], precision: str, dropout: bool) -> None:
    shape = (MODELS | {"moe": LLAMA | {"moe": EXPERTS}, "deepseek": DEEPSEEK})[model] | (
        {"hidden_dropout": 0.2, "attention_dropout": 0.1 if "cp" not in parallel else 0.0}
        if dropout
        else {}
    )
    config = make_config(shape, {"dp": 1} | parallel, steps=1, precision=precision)
    world = 1
    for axis in ("tp", "pp", "cp", "dp"):
        world *= int(parallel.get(axis, 1))
    for by_setting in run_ranks(
        gradients,
        world,
        [config, *(with_recompute(config, setting) for setting in SETTINGS)],
        timeout_s=180,
    ):
        expected, *others = by_setting
        assert expected.any()
        for setting, other in zip(SETTINGS, others, strict=True):
            assert torch.equal(other, expected), setting


def bytes_kept(rank: int, world_size: int, configs: list[TrainConfig]) -> list[int]:
    return [kept_bytes(config, make_mesh(rank, world_size, config)) for config in configs]


@pytest.mark.parametrize(
    "parallel",
    [
        {"tp": 2},
        pytest.param({"tp": 2, "sequence_parallel": True}, marks=pytest.mark.parity),
    ],
)
def test_bytes_kept_on_a_rank_are_the_formula(parallel: dict[str, Any]) -> None:
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
    latent = {
        name: value for name, value in MODELS["llama"].items() if name != "num_query_groups"
    } | {"mla": DEEPSEEK["mla"]}
    one_key_head = MODELS["llama"] | {
        "num_query_groups": 1,
        "qk_norm": True,
        "sliding_window": 9,
    }
    shapes = (*MODELS.values(), MODELS["llama"] | dropout, one_key_head, latent)
    plain = [make_config(shape, {"dp": 1} | parallel, steps=1) for shape in shapes]
    configs = [
        with_recompute(config, setting) for config in plain for setting in ({}, *SETTINGS)
    ]
    for measured in run_ranks(bytes_kept, 2, configs):
        planned = [
            kept_activations(config, range(config.model.num_layers), CPU)
            for config in configs
        ]
        assert measured == planned


@pytest.mark.parametrize(("model", "dropout"), [("llama", True), ("peri-norm", False)])
def test_gradients_of_a_zero_bubble_pipeline_with_sequence_parallelism_do_not_change(
    model: str, dropout: bool
) -> None:
    compare(
        model,
        {"pp": 2, "tp": 2, "sequence_parallel": True, "schedule": "zb-h1"},
        "bf16",
        dropout,
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "parallel", "precision", "dropout"),
    [
        ("llama", {"tp": 2, "sequence_parallel": True}, "fp32", False),
        ("gpt2", {"tp": 2}, "bf16", True),
        ("llama", {"pp": 2}, "fp32", False),
        ("gpt2", {"pp": 2, "schedule": "zb-h1"}, "fp32", False),
        ("gpt2", {"pp": 2, "vpp": 2}, "bf16", True),
        ("llama", {"pp": 2, "vpp": 2, "schedule": "zb-v"}, "fp32", True),
        ("llama", {"dp": 2}, "bf16", False),
        ("llama", {"cp": 2}, "fp32", True),
        ("llama", {"cp": 2, "cp_method": "a2a"}, "bf16", False),
        ("moe", {"dp": 2, "ep": 2}, "fp32", True),
        (
            "moe",
            {
                "tp": 2,
                "ep": 2,
                "etp": 1,
                "sequence_parallel": True,
                "pp": 2,
                "schedule": "zb-h1",
            },
            "bf16",
            False,
        ),
        (
            "deepseek",
            {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True, "pp": 2},
            "fp32",
            True,
        ),
        ("deepseek", {"cp": 2}, "fp32", False),
        ("deepseek", {"dp": 2, "zero": 3}, "bf16", False),
        ("gpt2", {"dp": 2, "zero": 3}, "fp32", True),
        ("llama", {"dp": 2, "tp": 2, "sequence_parallel": True, "zero": 3}, "bf16", False),
    ],
)
def test_gradients_of_other_layouts_do_not_change(
    model: str, parallel: dict[str, Any], precision: str, dropout: bool
) -> None:
    compare(model, parallel, precision, dropout)
