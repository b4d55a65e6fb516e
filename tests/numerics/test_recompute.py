"""What is recomputed is not kept, costs what it should, and changes no bit of a
gradient.
"""

import gc
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.block import Block
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.models.mlp import GatedActivation
from megatron_ray.ops.matmul import forward_product_plus
from megatron_ray.ops.products import PLAIN
from megatron_ray.parallelize.recompute import recomputed
from megatron_ray.planning.activations import kept_activations
from megatron_ray.planning.work import layer_work
from megatron_ray.tensor_parallel.norm import RMSNorm
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.activations import blocks_of, kept_bytes
from tests.support.parity import GPT2, LLAMA, RandomDataset, make_config

LAYERS = 3
EXPERTS = {
    "num_experts": 4,
    "ffn_hidden_size": 48,
    "layer_pattern": [1, 0, 1],
    "shared_expert_ffn_hidden_size": 32,
    "score_function": "sigmoid",
    "expert_bias": True,
    "aux_loss_coeff": 0.01,
    "z_loss_coeff": 1e-3,
    "capacity_factor": 1.0,
}
WITHOUT_GROUPS = {
    name: value for name, value in LLAMA.items() if name != "num_query_groups"
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MODELS = {
    "llama": LLAMA | {"num_layers": LAYERS},
    "gpt2": GPT2 | {"num_layers": LAYERS},
    "moe": LLAMA | {"num_layers": LAYERS, "moe": EXPERTS},
    "latent": WITHOUT_GROUPS | {"num_layers": LAYERS, "mla": LATENT},
    "latent-mtp": WITHOUT_GROUPS
    | {
        "num_layers": LAYERS,
        "mla": LATENT | {"q_lora_rank": None},
        "mtp": {"num_layers": 2},
    },
    "families": LLAMA
    | {
        "num_layers": LAYERS,
        "head_dim": 12,
        "qk_norm": True,
        "qkv_bias": True,
        "sliding_window": 7,
        "full_attention_every": 3,
        "activation": "geglu_tanh",
        "zero_centered_norm": True,
        "embedding_scale": 8.0,
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "core": {"granularity": "selective"},
    "norm": {"granularity": "selective", "modules": ["norm"]},
    "activation": {"granularity": "selective", "modules": ["activation"]},
    "mlp": {"granularity": "selective", "modules": ["mlp"]},
    "norm-activation": {"granularity": "selective", "modules": ["norm", "activation"]},
    "core-norm-mlp": {
        "granularity": "selective",
        "modules": ["core_attention", "norm", "mlp"],
    },
    "norm-moe": {"granularity": "selective", "modules": ["norm", "moe"]},
    "uniform1": {"granularity": "full", "method": "uniform", "num_layers": 1},
    "uniform2": {"granularity": "full", "method": "uniform", "num_layers": 2},
    "block2": {"granularity": "full", "method": "block", "num_layers": 2},
    "operations": {"granularity": "operations"},
    "all-products": {"granularity": "operations", "save": ["products"], "every": 1},
    "attention-alone": {"granularity": "operations", "save": ["attention"]},
}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}


def config_of(setting: str, model: str, precision: str, dropout: bool) -> TrainConfig:
    fields = make_config(
        MODELS[model] | (DROPOUT if dropout else {}),
        {"dp": 1},
        steps=1,
        precision=precision,
    ).model_dump()
    fields["training"]["recompute"] = SETTINGS[setting]
    return TrainConfig.from_mapping(fields)


def gradients(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Loss and main gradients of one step."""
    mesh = ParallelMesh.single()
    model, _ = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 4, 0, 1, batch_maker(config, mesh)
    )
    loss = forward_backward(model, mesh, loader.step(0))
    return loss, torch.cat([family.buffers.gradients for family in model.parameter_groups])


@pytest.mark.parametrize(
    ("model", "precision", "dropout"),
    [
        ("llama", "fp32", False),
        ("llama", "bf16", True),
        ("gpt2", "fp32", True),
        ("gpt2", "bf16", False),
        ("moe", "fp32", True),
        ("moe", "bf16", False),
        ("latent", "fp32", True),
        ("latent-mtp", "fp32", False),
        ("latent-mtp", "bf16", True),
        ("families", "fp32", False),
        ("families", "bf16", True),
    ],
)
def test_gradients_are_those_without_recomputation_to_the_bit(
    model: str, precision: str, dropout: bool
) -> None:
    loss, expected = gradients(config_of("none", model, precision, dropout))
    for setting in SETTINGS:
        again, measured = gradients(config_of(setting, model, precision, dropout))
        assert torch.equal(again, loss), setting
        assert torch.equal(measured, expected), setting


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama", {"training": {"fp8": {"recipe": "delayed"}}}),
        ("moe", {"training": {"fp8": {"recipe": "current"}}}),
        ("latent", {"training": {"fp8": {"recipe": "blockwise"}}}),
        pytest.param(
            "llama",
            {"training": {"compile": "blocks"}},
            marks=[
                pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
                # of the compiler, which looks at an input that is no leaf
                pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
            ],
        ),
        ("families", {"data": {"separate_documents": True}}),
        ("gpt2", {"training": {"fp32_residual_connection": True}}),
    ],
    ids=["delayed", "current", "blockwise", "compiled", "documents", "wide-residuals"],
)
def test_saved_outputs_change_no_bit_of_what_goes_with_recomputation(
    model: str, changes: dict[str, dict[str, Any]]
) -> None:
    by_setting = []
    for setting in ("none", "operations", "all-products"):
        fields = config_of(setting, model, "bf16", True).model_dump()
        for section, values in changes.items():
            fields[section] |= values
        by_setting.append(gradients(TrainConfig.from_mapping(fields)))
    (loss, expected), *others = by_setting
    for again, measured in others:
        assert torch.equal(again, loss)
        assert torch.equal(measured, expected)


def test_what_is_saved_is_freed_with_its_graph_not_by_garbage_collection() -> None:
    config = config_of("operations", "llama", "fp32", False)
    model, hidden, context = blocks_of(config, ParallelMesh.single())
    output = model.run_blocks(model.layers.values(), hidden, context)
    saved: Any = output.grad_fn
    # the inputs are referenced by the graph of an operation and by what replays it
    parts = [weakref.ref(saved.run), weakref.ref(saved.run.operations[0].inputs)]
    gc.disable()
    try:
        del saved, output
        assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("model", ["llama", "gpt2", "latent"])
@pytest.mark.parametrize("setting", ["operations", "all-products", "attention-alone"])
def test_products_of_a_second_run_have_the_planned_flops(
    monkeypatch: pytest.MonkeyPatch, model: str, setting: str
) -> None:
    flops = 0

    def counted(name: str) -> None:
        plain = getattr(PLAIN, name)

        def product(inputs: Tensor, weight: Tensor, *addend: Tensor) -> Tensor:
            nonlocal flops
            flops += 2 * inputs.shape[0] * weight.numel()
            output: Tensor = plain(inputs, weight, *addend)
            return output

        monkeypatch.setattr(PLAIN, name, product)

    counted("forward")
    counted("forward_plus")
    config = config_of(setting, model, "fp32", False)
    module, hidden, context = blocks_of(config, ParallelMesh.single())
    flops = 0
    output = module.run_blocks(module.layers.values(), hidden, context)
    by_layer = [layer_work(config, index) for index in range(LAYERS)]
    assert flops == sum(layer.forward.products for layer in by_layer)
    flops = 0
    output.sum().backward()
    assert flops == sum(layer.around_saved_outputs.products for layer in by_layer)


def without_capacity(config: TrainConfig) -> TrainConfig:
    """The formula takes every token to reach its experts."""
    fields = config.model_dump()
    if fields["model"]["moe"] is not None:
        fields["model"]["moe"]["capacity_factor"] = None
    return TrainConfig.from_mapping(fields)


NEW_CPU = DeviceKind("cpu", bf16_products=True)
OLD_CPU = DeviceKind("cpu", bf16_products=False)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    ("precision", "device"),
    [("fp32", OLD_CPU), ("bf16", OLD_CPU), ("bf16", NEW_CPU)],
    ids=["fp32", "bf16-in-fp32", "bf16"],
)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_kept_are_the_formula(
    model: str, precision: str, device: DeviceKind, dropout: bool
) -> None:
    mesh = replace(ParallelMesh.single(), device_kind=device)
    for setting in SETTINGS:
        config = without_capacity(config_of(setting, model, precision, dropout))
        measured = kept_bytes(config, mesh)
        formula = kept_activations(config, range(LAYERS), device)
        # it leaves out some of a router's sums
        allowed = 0.002 if model == "moe" else 0.0
        assert abs(measured - formula) <= allowed * formula, setting


@pytest.mark.parametrize(
    ("device", "kept"),
    [
        (NEW_CPU, 337_920),
        (OLD_CPU, 365_568),
        (DeviceKind("cuda", bf16_products=True), 365_568),
    ],
    ids=["blocks", "fused-in-fp32", "gpu"],
)
def test_latent_attention_in_blocks_keeps_less(device: DeviceKind, kept: int) -> None:
    config = config_of("none", "latent", "bf16", False)
    assert kept_activations(config, range(LAYERS), device) == kept
    if device.type == "cpu":
        assert (
            kept_bytes(config, replace(ParallelMesh.single(), device_kind=device)) == kept
        )


@pytest.mark.parametrize(
    ("setting", "layer_runs", "part_runs"),
    [
        ("none", 3, {"core": 3, "norm": 6, "activation": 3, "last": 3}),
        ("core", 3, {"core": 6, "norm": 6, "activation": 3, "last": 3}),
        ("norm", 3, {"core": 3, "norm": 12, "activation": 3, "last": 3}),
        ("activation", 3, {"core": 3, "norm": 6, "activation": 6, "last": 3}),
        ("mlp", 3, {"core": 3, "norm": 6, "activation": 6, "last": 3}),
        ("uniform1", 6, {"core": 6, "norm": 12, "activation": 6, "last": 3}),
        ("uniform2", 6, {"core": 6, "norm": 12, "activation": 6, "last": 4}),
        ("block2", 5, {"core": 5, "norm": 10, "activation": 5, "last": 3}),
        ("operations", 6, {"core": 3, "norm": 12, "activation": 6, "last": 3}),
        ("all-products", 6, {"core": 6, "norm": 12, "activation": 6, "last": 3}),
        ("attention-alone", 6, {"core": 3, "norm": 12, "activation": 6, "last": 3}),
    ],
)
def test_each_part_runs_as_often_as_it_should_and_the_last_product_of_a_region_once(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    layer_runs: int,
    part_runs: dict[str, int],
) -> None:
    runs = Counter[str]()

    def counted(kind: type[nn.Module], name: str) -> None:
        plain = kind.forward

        def forward(*arguments: Any) -> Any:
            runs[name] += 1
            return plain(*arguments)

        monkeypatch.setattr(kind, "forward", forward)

    def last_product(inputs: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
        runs["last"] += weight.shape[1] == LLAMA["ffn_hidden_size"]
        return forward_product_plus(inputs, weight, addend)

    monkeypatch.setattr(PLAIN, "forward_plus", last_product)
    for kind, name in (
        (Block, "layer"),
        (LocalAttention, "core"),
        (RMSNorm, "norm"),
        (GatedActivation, "activation"),
    ):
        counted(kind, name)
    model, hidden, context = blocks_of(
        config_of(setting, "llama", "fp32", False), ParallelMesh.single()
    )
    runs.clear()
    model.run_blocks(model.layers.values(), hidden, context).sum().backward()
    assert runs == {"layer": layer_runs, **part_runs}


def test_routing_is_reported_and_aux_losses_are_counted_once() -> None:
    results = []
    for setting in ("none", "norm-moe", "uniform2", "block2"):
        config = config_of(setting, "moe", "fp32", False)
        mesh = ParallelMesh.single()
        routed = list[tuple[int, Tensor]]()
        model, optimizer = build(config, mesh)
        model.module.on_route = lambda layer, experts, routed=routed: routed.append(
            (layer, experts)
        )
        batches = StepLoader(
            RandomDataset(config.model.vocabulary, 32),
            2,
            4,
            0,
            1,
            batch_maker(config, mesh),
        ).step(0)
        loss = forward_backward(model, mesh, batches)
        stats = reduce_step(
            model, optimizer, mesh, loss, sum(batch.num_tokens for batch in batches)
        )
        assert [layer for layer, _ in routed] == [0, 2] * 2, setting
        results.append((torch.stack([experts for _, experts in routed]), stats.values))
    (choices, values), *others = results
    assert (values[3:5] > 0).all()
    for other, recomputed_values in others:
        assert torch.equal(other, choices)
        assert torch.equal(recomputed_values, values)


def test_an_evaluation_recomputes_nothing_and_frees_nothing() -> None:
    mesh = ParallelMesh.single()
    model, hidden, context = blocks_of(
        config_of("norm-activation", "llama", "fp32", False), mesh
    )
    plain, _, _ = blocks_of(config_of("none", "llama", "fp32", False), mesh)
    for mode in (ForwardMode.EVAL, ForwardMode.TRAIN):
        with torch.no_grad():
            in_mode = replace(context, mode=mode)
            expected = plain.run_blocks(plain.layers.values(), hidden, in_mode)
            assert torch.equal(
                model.run_blocks(model.layers.values(), hidden, in_mode), expected
            )


def test_a_region_whose_inputs_need_no_gradient_still_gives_its_parameters_theirs() -> None:
    weight = torch.ones(3, requires_grad=True)
    recomputed(lambda x: x * weight, torch.arange(3.0)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 1, 2]


def test_frozen_embeddings_leave_the_gradients_of_recomputed_layers_as_they_are() -> None:
    by_setting = []
    for setting in ("none", "uniform1", "norm-activation"):
        fields = config_of(setting, "llama", "fp32", False).model_dump()
        fields["optimizer"]["freeze"] = ["embedding.*"]
        by_setting.append(gradients(TrainConfig.from_mapping(fields))[1])
    assert by_setting[0].any()
    assert all(torch.equal(by_setting[0], other) for other in by_setting[1:])
