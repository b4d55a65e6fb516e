"""Weights that ZeRO-3 gathers in FP8 change no bit of a run, and the bytes that are sent
are those of the plan.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.data.prepared import PreparedData
from megatron_ray.data_parallel.fp8_shards import Fp8Shard, Fp8Shards, WeightRows
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.ops.fp8.weights import Fp8Weight
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline
from megatron_ray.planning.buffers import RankBuffers, rank_buffers
from megatron_ray.planning.communication import (
    gather_communication,
    gather_scale_communication,
)
from megatron_ray.planning.hardware import GPU
from megatron_ray.planning.layer_communication import stage_communication
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.planning.microbatch import num_microbatches
from megatron_ray.planning.tally import Tally, group_sizes
from megatron_ray.training.session import build
from megatron_ray.validation.fp8 import fp8_problems
from tests.parallel import test_checkpoint_training as resuming
from tests.parallel.test_fp8 import EXPERTS, MODEL
from tests.parallel.test_meta_step import step, world
from tests.support.parity import RankResult, make_config, random_loader, run_layout
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
corpus = resuming.corpus

FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}
Layout = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Fields of model, parallelism and training."""
LAYOUTS: dict[str, Layout] = {
    "dp2": (MODEL, {"dp": 2}, {}),
    "dp2-experts": (EXPERTS, {"dp": 2}, {}),
    "tp2-dp2-recomputed": (
        MODEL,
        {"tp": 2, "dp": 2, "sequence_parallel": True},
        {"recompute": FULL},
    ),
    "pp2-dp2-operations-recomputed": (
        MODEL,
        {"pp": 2, "dp": 2},
        {"recompute": {"granularity": "operations"}},
    ),
    "dp3-uneven": (EXPERTS, {"dp": 3}, {}),
    "dp2-ep2-etp2": (
        EXPERTS,
        {"dp": 2, "ep": 2, "tp": 2, "sequence_parallel": True, "etp": 2},
        {},
    ),
    "dp2-copies-ends-in-bf16": (MODEL, {"dp": 4, "zero_replicas": 2}, {}),
}
FIRST = ("dp2", "tp2-dp2-recomputed", "pp2-dp2-operations-recomputed", "dp3-uneven")
RANK = 3


def configured(layout: Layout, *, param_gather: bool, ends: bool) -> TrainConfig:
    """`ends`: whether the first layer multiplies in bf16."""
    model, parallel, training = layout
    values = make_config(
        model,
        {"dp": 1, "zero": 3} | parallel,
        steps=4,
        precision="bf16",
        batch=24,
        micro_batch=1,
    ).model_dump()
    fp8 = {
        "recipe": "current",
        "param_gather": param_gather,
        "first_layers_in_bf16": int(ends),
    }
    values["training"] |= {"fp8": fp8} | training
    config = TrainConfig.from_mapping(values)
    assert fp8_problems(config) == []
    return config


def run_both(
    rank: int, world_size: int, configs: tuple[TrainConfig, TrainConfig]
) -> list[RankResult]:
    return [run_layout(rank, world_size, config, weights_after=3) for config in configs]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in FIRST else [pytest.mark.parity])
        for name in LAYOUTS
    ],
)
def test_no_bit_changes(layout: str) -> None:
    configs = tuple(
        configured(LAYOUTS[layout], param_gather=gather, ends="ends" in layout)
        for gather in (False, True)
    )
    world_size = ParallelDims.of(configs[0].parallel).world_size
    for plain, gathered in run_ranks(run_both, world_size, configs, timeout_s=180):
        assert plain.losses == gathered.losses
        assert plain.grad_norms == gathered.grad_norms
        for one, other in (
            (plain.gradients, gathered.gradients),
            (plain.weights, gathered.weights),
        ):
            for (name, _, values), (same_name, _, others) in zip(one, other, strict=True):
                assert name == same_name
                assert np.array_equal(values, others), name


def test_a_run_goes_on_here_and_elsewhere(
    run_ranks: resuming.Run, tmp_path: Path, corpus: PreparedData
) -> None:
    def gathering(config: TrainConfig, *, param_gather: bool) -> TrainConfig:
        values = config.model_dump()
        fp8 = {"recipe": "current", "param_gather": param_gather}
        values["training"] |= {"precision": "bf16", "fp8": fp8}
        return TrainConfig.from_mapping(values)

    here = gathering(resuming.config(tmp_path, 1, 2, zero=3), param_gather=True)
    there = gathering(resuming.config(tmp_path, 2, 1), param_gather=False)
    resuming.goes_on_here_and_elsewhere(run_ranks, here, there, corpus, rel=1e-2)


Sent = Counter[tuple[tuple[int, ...], str]]
"""Bytes by ranks of a group and kind."""
BYTES: dict[str, Layout] = {
    "tp2-dp4": (MODEL, {"tp": 2, "dp": 4, "sequence_parallel": True}, {}),
    "tp2-dp6-recomputed": (MODEL, {"tp": 2, "dp": 6}, {"recompute": FULL}),
    "experts": (
        EXPERTS
        | {
            "moe": EXPERTS["moe"]
            | {
                "capacity_factor": 1.0,
                "pad_to_capacity": True,
                "shared_expert_ffn_hidden_size": 64,
            },
        },
        {
            "tp": 2,
            "sequence_parallel": True,
            "dp": 4,
            "ep": 2,
            "etp": 2,
            "zero_replicas": 2,
        },
        {"recompute": {"granularity": "operations"}},
    ),
}


@contextmanager
def recorded(sent: Sent) -> Iterator[None]:
    """Counts what torch gathers, and what the library itself reduces."""
    gather = dist.all_gather_single
    reduce = collectives.start_all_reduce

    def note(kind: str, tensor: Tensor, group: Group) -> None:
        if group is not None and group.size() > 1:
            ranks = tuple(dist.get_process_group_ranks(group))
            sent[ranks, kind] += tensor.numel() * tensor.element_size()

    def noted_gather(output: Tensor, part: Tensor, *, group: Group, async_op: bool) -> Any:
        note("all_gather", part, group)
        return gather(output, part, group=group, async_op=async_op)

    def noted_reduction(tensor: Tensor, group: Group, *args: Any) -> Any:
        note("all_reduce", tensor, group)
        return reduce(tensor, group, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", noted_gather)
        patch.setattr(collectives, "start_all_reduce", noted_reduction)
        yield


def by_ranks(tally: Tally, mesh: ParallelMesh) -> Sent:
    groups = {
        "tp": mesh.tp_group,
        "etp": mesh.etp_group,
        "ep": mesh.ep_group,
        "shard": mesh.shard_group,
        "edp": mesh.expert_replica_group,
    }
    sent = Sent()
    for (axis, kind), size in tally.bytes.items():
        if axis in groups:
            group = groups[axis]
            assert group is not None
            sent[tuple(dist.get_process_group_ranks(group)), kind] += size
    return sent


def of_kind(sent: Sent, kind: str) -> dict[tuple[int, ...], int]:
    return {ranks: size for (ranks, of), size in sent.items() if of == kind and size}


@pytest.mark.parametrize("param_gather", [False, True])
@pytest.mark.parametrize("layout", BYTES)
def test_bytes_of_a_gather_are_those_of_the_plan(
    layout: str, *, param_gather: bool
) -> None:
    """A forward pass without gradients gathers each weight once."""
    config = configured(BYTES[layout], param_gather=param_gather, ends=layout == "experts")
    dims, buffers = planned_buffers(config)
    sent = Sent()
    with world(RANK, dims.world_size):
        mesh = ParallelMesh.create(dims, World(RANK, dims.world_size, 0, "cpu"))
        model, _ = build(config, mesh, initialise=False)
        batch = random_loader(config, mesh, StepLoader).step(0)[0]
        with recorded(sent), torch.no_grad():
            model.module(batch)
        planned = by_ranks(gather_communication(config, dims, buffers), mesh)
    assert of_kind(sent, "all_gather") == of_kind(planned, "all_gather")


@pytest.mark.parametrize("layout", BYTES)
def test_scales_are_reduced_once_a_step_as_planned(layout: str) -> None:
    """Instead of those of weights in each product; everything else is the same."""
    more = Sent()
    for param_gather, sign in ((True, 1), (False, -1)):
        config = configured(BYTES[layout], param_gather=param_gather, ends=False)
        dims, buffers = planned_buffers(config)
        planned = Tally(group_sizes(dims))
        (stage,) = plan_pipeline(config).stages_of(0)
        planned.add_all(stage_communication(config, dims, stage), num_microbatches(config))
        planned.add_all(gather_scale_communication(config, dims, buffers))
        expected = Sent()
        sent = Sent()

        @contextmanager
        def around(
            mesh: ParallelMesh,
            planned: Tally = planned,
            sent: Sent = sent,
            expected: Sent = expected,
        ) -> Iterator[None]:
            expected.update(by_ranks(planned, mesh))
            with recorded(sent):
                yield

        step(config, RANK, "cpu", around)
        for key, size in sent.items():
            more[key] += sign * size
        for key, size in expected.items():
            more[key] -= sign * size
    assert not any(size for (_, kind), size in more.items() if kind == "all_reduce")


def planned_buffers(config: TrainConfig) -> tuple[ParallelDims, RankBuffers]:
    dims = ParallelDims.of(config.parallel)
    return dims, rank_buffers(config, dims, plan_pipeline(config), RANK)


def test_gathered_weights_have_half_the_bytes_in_a_plan() -> None:
    plain, gathered = (
        fullest_rank(configured(LAYOUTS["dp2"], param_gather=gather, ends=False), GPU)
        for gather in (False, True)
    )
    weights = 4 * 64 * 64 + 3 * 64 * 128
    saved = plain.gathered_bytes_estimate - gathered.gathered_bytes_estimate
    assert saved == 2 * weights, "a byte of each in two layers"
    assert plain.total_bytes - gathered.total_bytes == saved


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_value_that_is_not_finite_makes_its_weight_so(value: float) -> None:
    rows = torch.ones(32, 16)
    rows[20, 3] = value
    weights = {
        "one": WeightRows(rows[:16], 0, 16, 16, 1),
        "other": WeightRows(rows, 0, 32, 32, 2),
    }
    shards = Fp8Shards(weights, (), torch.bfloat16, rows.device)
    shards.update_scales()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    read = {}
    for name, shard in shards.shards().items():
        assert isinstance(shard, Fp8Shard)
        inputs, nothing = shard.fsdp_pre_all_gather(None, None, None, None, policy)
        weight = shard.fsdp_post_all_gather(inputs, nothing, torch.bfloat16)
        assert weight is not None
        read[name] = weight[0]
    one, other = read["one"], read["other"].view(2, 16, 16)
    for matrix, is_finite in ((one, True), (other[0], True), (other[1], False)):
        assert isinstance(matrix, Fp8Weight)
        numbers = matrix.quantized(transposed=False).dequantize(torch.float32)
        if is_finite:
            assert torch.equal(numbers, torch.ones(16, 16))
        else:
            assert numbers.isnan().all()
