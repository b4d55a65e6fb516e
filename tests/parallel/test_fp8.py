"""Training in FP8: what is learnt is what bf16 learns, in every layout, before and after a
checkpoint; and it keeps no other bytes than bf16.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.checkpoint.hf.exporting import export_folder
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.inference.generate import generate, load_model
from megatron_ray.ops.fp8.products import Fp8Multiplication
from megatron_ray.ops.fp8.quantize import E5M2
from megatron_ray.ops.fp8.recipe import Recipe
from megatron_ray.parallelize.parallelize import parallelize
from megatron_ray.planning.activations import kept_activations
from megatron_ray.tensor_parallel.group import TensorParallel
from megatron_ray.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ray.validation.fp8 import fp8_problems
from tests.parallel import test_checkpoint_training as resuming
from tests.support import parity
from tests.support.activations import kept_bytes
from tests.support.parity import LLAMA, make_config, make_mesh
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
corpus = resuming.corpus

MODEL = LLAMA | {"num_query_groups": 4, "ffn_hidden_size": 128}
EXPERTS = MODEL | {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}}
DELAYED: dict[str, Any] = {
    "recipe": "delayed",
    "amax_history_length": 4,
    "amax_algorithm": "max",
}
RECIPES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "delayed": DELAYED,
    "current": {"recipe": "current"},
    "current-e4m3": {"recipe": "current", "format": "e4m3"},
    "blockwise": {"recipe": "blockwise"},
    "mxfp8": {"recipe": "mxfp8"},
}


def config_of(
    recipe: str,
    parallel: dict[str, Any] | None = None,
    *,
    steps: int,
    model: dict[str, Any] = MODEL,
    **training: Any,
) -> TrainConfig:
    fields = make_config(
        model,
        {"dp": 1} | (parallel or {}),
        steps=steps,
        precision="bf16",
        batch=4,
        micro_batch=2,
    ).model_dump()
    fields["training"] |= {"fp8": RECIPES[recipe]} | training
    config = TrainConfig.from_mapping(fields)
    assert not fp8_problems(config)
    return config


@cache
def losses(recipe: str, steps: int) -> np.ndarray:
    config = config_of(recipe, steps=steps, micro_batch_size=4)
    return np.asarray(parity.run_layout(0, 1, config).losses)


@pytest.mark.parametrize(
    "steps", [30, pytest.param(300, marks=pytest.mark.parity)], ids=["30", "300"]
)
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "bf16"])
def test_losses_stay_within_a_hundredth_of_those_in_bf16(recipe: str, steps: int) -> None:
    expected = losses("bf16", steps)
    assert expected[-1] < expected[0] - 0.3
    np.testing.assert_allclose(losses(recipe, steps), expected, rtol=0.01)
    assert not np.array_equal(losses(recipe, steps), expected)


Layouts = list[tuple[str, dict[str, Any], dict[str, Any]]]
STEPS = 4
LAYOUTS: Layouts = [
    ("delayed", MODEL, {"dp": 2, "zero": 3}),
    ("delayed", MODEL, {"tp": 2, "sequence_parallel": True}),
    ("current", EXPERTS, {"tp": 2, "sequence_parallel": True, "etp": 2}),
    ("blockwise", EXPERTS, {"dp": 2, "ep": 2}),
    ("mxfp8", MODEL, {"pp": 2, "vpp": 2, "schedule": "zb-v", "layout": "E|t|t|L"}),
]
MORE_LAYOUTS: Layouts = [
    ("delayed", MODEL, {"pp": 2}),
    ("delayed", MODEL, {"dp": 2}),
    ("delayed", EXPERTS, {"dp": 2, "ep": 2}),
    ("delayed", MODEL, {"cp": 2}),
    ("current", MODEL, {"tp": 2, "sequence_parallel": True}),
    ("current", MODEL, {"cp": 2}),
    ("blockwise", MODEL, {"dp": 2}),
    ("mxfp8", MODEL, {"tp": 2}),
]


def run_all(rank: int, world_size: int, configs: list[TrainConfig]) -> list[list[float]]:
    return [parity.run_layout(rank, world_size, config).losses for config in configs]


@pytest.mark.parametrize(
    "layouts",
    [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.parity)],
    ids=["some", "more"],
)
def test_every_layout_has_the_losses_of_one_rank(layouts: Layouts) -> None:
    configs = [
        config_of(recipe, parallel, steps=STEPS, model=model)
        for recipe, model, parallel in layouts
    ]
    for results in run_ranks(run_all, 2, configs, timeout_s=180):
        for (recipe, model, parallel), measured in zip(layouts, results, strict=True):
            expected = one_rank(recipe, model is EXPERTS)
            np.testing.assert_allclose(measured, expected, 5e-3, err_msg=str(parallel))


@cache
def one_rank(recipe: str, experts: bool) -> list[float]:
    config = config_of(recipe, steps=STEPS, model=EXPERTS if experts else MODEL)
    return parity.run_layout(0, 1, config).losses


def column_and_row(rank: int, world_size: int) -> list[Tensor]:
    """Outputs and gradients of the two layers of an MLP, each rank with its part."""
    mesh = ParallelMesh.single()
    if world_size > 1:
        mesh = make_mesh(rank, world_size, config_of("current", {"tp": 2}, steps=1))
    tp = TensorParallel.of_group(mesh.tp_group, sequence_parallel=False)
    torch.manual_seed(2)
    inputs = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(world_size, 96 // world_size, 64).bfloat16()
    # Only one rank has the largest value.
    up[0, 0, 0] = 20
    part = ColumnParallelLinear(up[rank].shape, bias=False, tp=tp, dtype=torch.bfloat16)
    part.weight.data = up[rank]
    recipe = Recipe(E5M2, "emulated")
    part.multiplication = Fp8Multiplication(recipe, mesh.tp_group, ("weight", "grad"))
    inner = part(inputs)
    down = torch.randn(world_size, 96 // world_size, 64).bfloat16()[rank].t().contiguous()
    row = RowParallelLinear(down.shape, bias=False, tp=tp, dtype=torch.bfloat16)
    row.weight.data = down
    row.multiplication = Fp8Multiplication(recipe, mesh.tp_group, ("inputs", "weight"))
    output = row(inner, None)
    output.backward(torch.randn(32, 64).bfloat16())
    assert inputs.grad is not None
    assert part.weight.grad is not None
    assert row.weight.grad is not None
    return [
        tensor.detach()
        for tensor in (inner, part.weight.grad, row.weight.grad, output, inputs.grad)
    ]


def test_tensors_of_which_ranks_have_parts_have_one_scale() -> None:
    """The operands have the same FP8 values, so what sums nothing over ranks is equal to
    the bit.
    """
    inner, up_grad, down_grad, *summed = column_and_row(0, 1)
    ranks = run_ranks(column_and_row, 2)
    assert torch.equal(torch.cat([rank[0] for rank in ranks], 1), inner)
    assert torch.equal(torch.cat([rank[1] for rank in ranks], 0), up_grad)
    assert torch.equal(torch.cat([rank[2] for rank in ranks], 1), down_grad)
    for number, tensor in enumerate(summed, 3):
        # Rounded once more to bf16.
        error = (ranks[0][number] - tensor).abs().max()
        assert error <= 2**-7 * tensor.abs().max()


def in_fp8(settings: TrainConfig, **fields: Any) -> TrainConfig:
    values = settings.model_dump()
    values["training"] |= {"precision": "bf16", "fp8": DELAYED | fields}
    return TrainConfig.from_mapping(values)


def test_a_run_goes_on_here_and_elsewhere_with_its_scales(
    run_ranks: resuming.Run, tmp_path: Path, corpus: PreparedData
) -> None:
    here, there = (
        in_fp8(resuming.config(tmp_path, *degrees)) for degrees in ((1, 2), (2, 1))
    )
    _, half = resuming.goes_on_here_and_elsewhere(run_ranks, here, there, corpus, rel=1e-2)
    model, tokenizer = load_model(half)
    text = generate(model, tokenizer, "line 7: ", 8, temperature=0)
    assert len(text.tokens) > 0
    assert export_folder(half, str(tmp_path / "hf")).tensors > 0


def test_a_run_may_change_to_fp8_and_to_another_history(
    tmp_path: Path, corpus: PreparedData
) -> None:
    def changed(length: int, steps: int, changes: list[str]) -> TrainConfig:
        settings = in_fp8(resuming.config(tmp_path, 1, 1), amax_history_length=length)
        values = settings.model_dump()
        values["training"]["steps"] = steps
        values["checkpoint"]["resume_changes"] = ["data.train", *changes]
        return TrainConfig.from_mapping(values)

    resuming.train(0, 1, resuming.config(tmp_path, 1, 1), corpus, 1, None)
    half, _ = (info.path for info in list_checkpoints(str(tmp_path / "tp1")))
    commit(half, {}, [])
    to_fp8 = changed(4, 8, ["training.precision", "training.fp8"])
    after = resuming.train(0, 1, to_fp8, corpus, 2, half)
    assert sorted(after) == [0, 5, 6, 7, 8]
    last = list_checkpoints(str(tmp_path / "tp1"))[-1].path
    commit(last, {}, [])
    longer = changed(9, 9, ["training.steps", "training.fp8.amax_history_length"])
    assert sorted(resuming.train(0, 1, longer, corpus, 3, last)) == [0, 9]


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
@pytest.mark.parametrize("modules", [None, ["norm", "activation"]])
def test_bytes_kept_are_those_of_bf16(recipe: str, modules: list[str] | None) -> None:
    recompute = {"granularity": "selective" if modules else "none", "modules": modules}
    mesh = ParallelMesh.single()
    for name in (recipe, "bf16"):
        config = config_of(name, steps=1, recompute=recompute)
        formula = kept_activations(config, range(2), mesh.device_kind)
        assert kept_bytes(config, mesh) == formula


def test_only_linear_layers_inside_the_chosen_blocks_multiply_in_fp8() -> None:
    model = EXPERTS | {"num_layers": 4, "mtp": {"num_layers": 1}}
    ends = {"fp8": DELAYED | {"first_layers_in_bf16": 1, "last_layers_in_bf16": 2}}

    def layers(**training: Any) -> set[str]:
        config = config_of("delayed", steps=1, model=model, **training)
        built = parallelize(config, make_mesh(0, 1, config))
        assert built.delayed_scaling is not None
        return {name.rpartition("/")[0] for name in built.delayed_scaling.state()}

    kinds = {"attention.qkv", "attention.o", "moe.experts.gate_up", "moe.experts.down"}
    assert layers(**ends) == {f"layers.1.{kind}" for kind in kinds}
    of_blocks = {f"layers.{index}.{kind}" for index in range(4) for kind in kinds}
    of_mtp = {f"mtp.0.block.{kind}" for kind in kinds} | {"mtp.0.projection"}
    assert layers() == of_blocks | of_mtp
