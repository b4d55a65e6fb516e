"""What Transformer Engine excludes is refused with the field and the remedy, which is legal."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation import check
from megatron_ray.validation.initial_weights import contradictions
from megatron_ray.validation.resume.comparison import compare


def config(spec: str = "transformer_engine", **groups: dict[str, Any]) -> TrainConfig:
    model = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
    training = {
        "seq_length": 256,
        "global_batch_size": 4,
        "steps": 10,
        "precision": "bf16",
    }
    return TrainConfig.from_mapping(
        {
            "model": model | {"spec": spec} | groups.get("model", {}),
            "parallel": groups.get("parallel", {}),
            "training": training | groups.get("training", {}),
            "data": {"train": [{"path": "builtin://python-stdlib"}]},
            "optimizer": {"lr": 1e-3},
        }
    )


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"training": {"precision": "fp32"}},
        "/model/spec",
        "spec=transformer_engine is for precision bf16 or fp16, not for fp32, which most of "
        "its attention does not support; set training.precision to bf16, or spec to local",
    ),
    (
        {"training": {"fp32_residual_connection": True}},
        "/training/fp32_residual_connection",
        "fp32_residual_connection gives the first norm of a half another type than its "
        "product, and spec=transformer_engine computes both at once; leave it out, or set "
        "model.spec to local",
    ),
    (
        {"training": {"fp8": {"recipe": "delayed"}}},
        "/training/fp8/recipe",
        "recipe=delayed keeps scales from step to step, and those inside of "
        "spec=transformer_engine are not part of checkpoints; use current, or set model.spec "
        "to local",
    ),
    (
        {"parallel": {"zero": 3}},
        "/parallel/zero",
        "zero=3 frees weights that spec=transformer_engine still reads in the backward pass; "
        "use zero=1, or set model.spec to local",
    ),
    (
        {"parallel": {"tp": 2, "sequence_parallel": True, "tp_comm_overlap": True}},
        "/parallel/tp_comm_overlap",
        "tp_comm_overlap with tp=2 cuts products of spec=local, and spec=transformer_engine "
        "multiplies and sends inside of the library; leave it out, or set model.spec to local",
    ),
    (
        {
            "model": {"moe": {"num_experts": 4, "top_k": 2}},
            "parallel": {"dp": 2, "ep": 2, "ep_comm_overlap": True},
        },
        "/parallel/ep_comm_overlap",
        "ep_comm_overlap with ep=2 switches between two passes inside of a layer, and the "
        "library keeps the state of one of them; leave it out, or set model.spec to local",
    ),
    (
        {"parallel": {"pp": 2, "schedule": "zb-h1"}},
        "/parallel/schedule",
        "schedule=zb-h1 computes gradients of weights after those of activations, and "
        "spec=transformer_engine computes both at once; use 1f1b, or set model.spec to local",
    ),
    (
        {
            "training": {
                "recompute": {"granularity": "selective", "modules": ["norm", "activation"]}
            }
        },
        "/training/recompute/modules",
        "norm frees the output of a norm, which spec=transformer_engine computes inside of "
        "the product that reads it; leave it out, or set model.spec to local",
    ),
    (
        {"training": {"recompute": {"granularity": "operations"}}},
        "/training/recompute/granularity",
        "granularity=operations keeps outputs of operations, and spec=transformer_engine "
        "computes several of them at once; use selective or full, or set model.spec to local",
    ),
]


@pytest.mark.parametrize(
    ("groups", "pointer", "detail"), REFUSED, ids=[pointer for _, pointer, _ in REFUSED]
)
def test_a_combination_is_refused_with_its_remedy(
    groups: dict[str, Any], pointer: str, detail: str
) -> None:
    (problem,) = check.find_problems(config(**groups))
    assert (problem.pointer, problem.code) == (pointer, "transformer_engine")
    assert problem.detail == detail
    assert not check.find_problems(config("local", **groups))


@pytest.mark.parametrize(
    "groups",
    [
        {"training": {"precision": "fp16"}},
        {"training": {"fp8": {"recipe": "current"}}},
        {"training": {"fp8": {"recipe": "mxfp8"}, "compile": "blocks"}},
        {"parallel": {"zero": 1, "tp": 2, "sequence_parallel": True}},
        {"parallel": {"pp": 2, "vpp": 2, "schedule": "interleaved"}},
        {"training": {"recompute": {"granularity": "selective"}}},
        {
            "training": {
                "recompute": {"granularity": "full", "method": "block", "num_layers": 1}
            }
        },
        {"model": {"moe": {"num_experts": 4, "top_k": 2}}, "parallel": {"dp": 2, "ep": 2}},
    ],
)
def test_all_else_is_legal(groups: dict[str, Any]) -> None:
    assert not check.find_problems(config(**groups))


def test_weights_and_checkpoints_are_those_of_the_local_spec() -> None:
    ours, local = config(), config("local")
    assert not contradictions(ours.model, local.model)
    assert not contradictions(local.model, ours.model)
    assert not compare(ours, local, "the checkpoint has").changed
