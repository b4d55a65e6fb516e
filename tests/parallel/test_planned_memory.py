"""What a plan gives for a rank's memory is what it does hold: every rank of every layout
of the matrix, without other processes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.config.presets.presets import PRESETS
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline
from megatron_ray.planning.activations import kept_by_stage
from megatron_ray.planning.buffers import rank_buffers
from megatron_ray.planning.communication import kept_mean_bytes
from megatron_ray.planning.memory import (
    RankMemory,
    fullest_rank,
    state_memory,
    with_activations,
)
from megatron_ray.training.session import batch_maker, build
from tests.parallel.test_matrix import MATRIX
from tests.parallel.test_meta_step import world
from tests.parallel.test_recompute import PERI_NORM
from tests.support.layout_matrix import EXPERTS, Entry
from tests.support.parity import GPT2, LLAMA, RandomDataset, make_config

PRECISIONS = ("fp32", "bf16")
CPUS = {
    "new": DeviceKind("cpu", bf16_products=True),
    "old": DeviceKind("cpu", bf16_products=False),
}
"""Both run on either machine: the kernels are chosen by a mesh's device kind."""


def runs(entries: Sequence[Entry]) -> list[Any]:
    """Every entry in one precision, in turn; in the other one where all layouts are
    compared.
    """
    return [
        pytest.param(
            entry,
            precision,
            id=f"{entry.name}-{precision}",
            marks=[] if place % 2 == turn else [pytest.mark.parity],
        )
        for place, entry in enumerate(entries)
        for turn, precision in enumerate(PRECISIONS)
    ]


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rank_memory(config: TrainConfig, rank: int, device: DeviceKind) -> RankMemory:
    world = ParallelDims.of(config.parallel)
    dims = world.of_group
    pipeline = plan_pipeline(config)
    buffers = rank_buffers(config, dims, pipeline, world.rank_in_group(rank))
    state = state_memory(config, dims, buffers)
    return with_activations(config, pipeline, state, buffers.pp_rank, device)


def held_bytes(config: TrainConfig, rank: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state that are allocated on a rank, what
    is offloaded included.
    """
    dims = ParallelDims.of(config.parallel)
    # torch's fully_shard takes no parameters on meta.
    device = "cpu" if config.parallel.zero == 3 else "meta"
    with world(rank, dims.world_size):
        model, optimizer = build(
            config,
            ParallelMesh.create(dims, World(rank, dims.world_size, 0, device)),
            initialise=False,
        )
    buffers = [family.buffers for family in model.parameter_groups]
    gradients = [part.gradients for part in buffers]
    gradients += [
        shard._gradient_shard
        for shard in optimizer.shards
        if shard._gradient_shard is not None
    ]
    state = [tensor for shard in optimizer.shards for tensor in shard.state.values()]
    for shard in optimizer.shards:
        state.extend(shard.matrix_state.values())
    main = [shard.main_parameters.kept for shard in optimizer.shards]
    state += [kept for kept in main if kept is not None]
    if optimizer.group_sync is not None:
        for each in optimizer.group_sync._parts:
            assert each.outer is not None
            for flats in each.outer.state().values():
                state.extend(flats)
    return (
        size([part.parameters for part in buffers]),
        size(gradients),
        size(state),
    )


@pytest.mark.parametrize(("entry", "precision"), runs(MATRIX))
def test_weights_gradients_and_optimizer_state_are_counted_to_the_byte(
    entry: Entry, precision: str
) -> None:
    config = entry.config(steps=1, precision=precision)
    device = CPUS["new"]  # of which these bytes know nothing
    planned = [rank_memory(config, rank, device) for rank in range(entry.world_size)]
    for rank in (0, entry.world_size - 1):
        planned_bytes = (
            planned[rank].parameters_bytes,
            planned[rank].gradients_bytes,
            planned[rank].optimizer_bytes,
        )
        assert planned_bytes == held_bytes(config, rank)
    assert fullest_rank(config, device).total_bytes == max(
        memory.total_bytes for memory in planned
    )


SHARDED = [entry for entry in MATRIX if entry.parallel["zero"] == 1][:2]
ROWS = [entry for entry in MATRIX if entry.parallel["zero"] == 3][:1]


@pytest.mark.parametrize("entry", SHARDED + ROWS, ids=lambda entry: entry.name)
def test_matrices_of_muon_have_one_moment_and_the_rest_two(entry: Entry) -> None:
    fields = entry.config(steps=1, precision="bf16").model_dump()
    fields["optimizer"] = {"name": "muon", "lr": 0.1}
    config = TrainConfig.from_mapping(fields)
    planned = [rank_memory(config, rank, CPUS["new"]) for rank in range(entry.world_size)]
    for rank in (0, entry.world_size - 1):
        assert planned[rank].optimizer_bytes == held_bytes(config, rank)[2]
    assert fullest_rank(config, CPUS["new"]).total_bytes == max(
        memory.total_bytes for memory in planned
    )


def assert_planned_state(config: TrainConfig) -> None:
    """Weights, gradients and state of rank 1 have the bytes of its plan."""
    memory = rank_memory(config, 1, CPUS["new"])
    assert (
        memory.parameters_bytes,
        memory.gradients_bytes,
        memory.optimizer_bytes,
    ) == held_bytes(config, 1)


@pytest.mark.parametrize(
    ("parallel", "momentum"),
    [({"dp": 4}, 0.9), ({"dp": 4, "zero": 0}, 0.0), ({"dp": 2, "tp": 2}, 0.9)],
)
def test_an_outer_optimizer_keeps_copies_of_what_is_updated(
    parallel: dict[str, Any], momentum: float
) -> None:
    local_sgd = {"groups": 2, "sync_every": 2, "outer_optimizer": {"momentum": momentum}}
    layout = parallel | {"local_sgd": local_sgd}
    assert_planned_state(make_config(LLAMA, layout, steps=1, precision="bf16"))


def test_what_is_frozen_has_neither_gradients_nor_state() -> None:
    fields = MATRIX[0].config(steps=1, precision="bf16").model_dump()
    fields["optimizer"]["freeze"] = ("layers.[01].*", "embedding.weight")
    config = TrainConfig.from_mapping(fields)
    assert_planned_state(config)


@pytest.mark.parametrize(
    "parallel", [{"dp": 2}, {"dp": 2, "zero": 0}, {"dp": 2, "zero": 3}]
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_short_gradients_have_fp32_copies_of_what_is_updated(
    parallel: dict[str, Any], precision: str
) -> None:
    fields = make_config(LLAMA, parallel, steps=1, precision=precision).model_dump()
    fields["training"]["grad_reduce_in_fp32"] = False
    config = TrainConfig.from_mapping(fields)
    assert_planned_state(config)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("parallel", [{"dp": 2}, {"dp": 2, "zero": 0}, {"tp": 2, "pp": 2}])
def test_remainders_have_two_bytes(parallel: dict[str, Any], name: str) -> None:
    layout = {"dp": 1} | parallel
    fields = make_config(LLAMA, layout, steps=1, precision="bf16").model_dump()
    plain = TrainConfig.from_mapping(fields | {"optimizer": {"name": name, "lr": 0.1}})
    fields["optimizer"] = {"name": name, "lr": 0.1, "store_param_remainders": True}
    config = TrainConfig.from_mapping(fields)
    assert_planned_state(config)
    updated = sum(
        buffer.num_updated
        for buffer in rank_buffers(
            config, ParallelDims.of(config.parallel), plan_pipeline(config), 1
        ).buffers
    )
    saved = rank_memory(plain, 1, CPUS["new"]).total_bytes
    assert saved - rank_memory(config, 1, CPUS["new"]).total_bytes == 2 * updated


@pytest.mark.parametrize("remainders", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("parallel", [{"dp": 2}, {"dp": 2, "zero": 3}])
def test_offloaded_state_is_planned_where_it_is(
    parallel: dict[str, Any], precision: str, remainders: bool
) -> None:
    fields = make_config(LLAMA, parallel, steps=1, precision=precision).model_dump()
    fields["optimizer"] = {
        "lr": 0.1,
        "offload": True,
        "store_param_remainders": remainders,
    }
    config = TrainConfig.from_mapping(fields)
    memory = rank_memory(config, 1, CPUS["new"])
    assert memory.optimizer_bytes == 0
    assert memory.offloaded_bytes == held_bytes(config, 1)[2] > 0
    assert "optimizer state" not in {name for name, size in memory.terms.items() if size}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("parallel", [{"dp": 2}, {"dp": 2, "zero": 3}])
def test_short_moments_have_two_bytes(parallel: dict[str, Any], name: str) -> None:
    fields = make_config(LLAMA, parallel, steps=1, precision="bf16").model_dump()
    fields["optimizer"] = {"name": name, "lr": 0.1, "exp_avg_dtype": "bf16"}
    assert_planned_state(TrainConfig.from_mapping(fields))


@pytest.mark.parametrize(
    "model", [LLAMA, GPT2 | {"hidden_dropout": 0.1}, LLAMA | PERI_NORM, GPT2 | PERI_NORM]
)
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}])
def test_activations_in_fp16_with_wide_residuals_are_planned_as_they_are(
    parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    fields = make_config(
        model, {"dp": 1} | parallel, steps=1, micro_batch=1, precision="fp16"
    ).model_dump()
    fields["training"] |= {"seq_length": 64, "fp32_residual_connection": True}
    fields["model"]["max_sequence_length"] = 64
    assert_kept(TrainConfig.from_mapping(fields), CPUS["new"], within=0.01)


def kept(
    model: ParallelModel, stage: StageContents, config: TrainConfig, mesh: ParallelMesh
) -> int:
    """Storages that autograd holds of one microbatch of a stage; parameters, and angles
    that all layers share, are left out.
    """
    dataset = RandomDataset(config.model.vocabulary, config.training.seq_length)
    batch = StepLoader(
        dataset, 1, 8, mesh.dp_rank, mesh.dims.dp, batch_maker(config, mesh, 0)
    ).step(0)[0]
    tokens = batch.tokens_BS.numel() // (mesh.dims.tp if model.sequence_parallel else 1)
    received = (
        None
        if stage.embedding
        else torch.randn(
            tokens, config.model.hidden_size, dtype=model.hidden_dtype, requires_grad=True
        )
    )
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.module.stage(stage, received, batch)
    assert output.requires_grad  # and alive, so that nothing has been freed
    angles = [
        tensor for tensor in saved if tensor.shape[1:3] == (batch.tokens_BS.shape[1], 1)
    ]
    apart = {
        tensor.untyped_storage()._cdata for tensor in (*model.module.parameters(), *angles)
    }
    # A tensor without values has no memory.
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in saved
        if not tensor.is_meta
    }
    return sum(size for storage, size in storages.items() if storage not in apart)


@pytest.mark.parametrize(
    ("entry", "precision"), runs([entry for entry in MATRIX if entry.parallel["zero"] != 3])
)
def test_activations_of_a_microbatch_are_within_a_tenth(
    entry: Entry, precision: str
) -> None:
    fields: dict[str, Any] = entry.config(steps=1, precision=precision).model_dump()
    fields["training"]["seq_length"] = 64
    if entry.experts:  # no other rank is there to send its count of rows
        fields["model"]["moe"] = EXPERTS | {"capacity_factor": 1.0, "pad_to_capacity": True}
    for cpu in CPUS.values():
        assert_kept(TrainConfig.from_mapping(fields), cpu, within=0.1)


def assert_kept(config: TrainConfig, device: DeviceKind, within: float) -> None:
    """Of every stage on the last rank, with the kernels of such a device."""
    dims = ParallelDims.of(config.parallel)
    rank = dims.world_size - 1
    with world(rank, dims.world_size):
        mesh = ParallelMesh.create(dims, World(rank, dims.world_size, 0, "cpu"))
        mesh = replace(mesh, device_kind=device)
        model, _ = build(config, mesh, initialise=False)
        for stage in model.module.stages:
            planned = kept_by_stage(config, stage, device)
            assert planned == pytest.approx(kept(model, stage, config, mesh), rel=within)


ROOM = {"capacity_factor": 1.0, "pad_to_capacity": True}
DEEPSEEK = PRESETS["deepseek-tiny"] | {"vocab_size": 259, "mtp": {"num_layers": 2}}
DEEPSEEK_WITH_ROOM = DEEPSEEK | {"moe": DEEPSEEK["moe"] | ROOM}
DENSE = {name: value for name, value in DEEPSEEK.items() if name != "moe"}
DEEPSEEK_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "alone": (DEEPSEEK_WITH_ROOM, {}, {}),
    "tp-sp": (DENSE, {"tp": 2, "sequence_parallel": True}, {}),
    "tp": (DENSE, {"tp": 2}, {}),
    "direct-queries": (
        DENSE | {"mla": DENSE["mla"] | {"q_lora_rank": None}, "tie_embeddings": True},
        {"tp": 2, "sequence_parallel": True},
        {},
    ),
    "ring": (DENSE, {"tp": 2, "cp": 2}, {}),
    "heads-exchanged": (DENSE, {"cp": 2, "cp_method": "a2a"}, {}),
    "pipeline": (
        DEEPSEEK_WITH_ROOM,
        {"tp": 2, "sequence_parallel": True, "pp": 2, "layout": "Ettt|tmmL"},
        {},
    ),
    "recomputed": (
        DENSE,
        {"pp": 2, "vpp": 2},
        {"granularity": "full", "method": "uniform", "num_layers": 1},
    ),
    "norms": (
        DENSE,
        {"tp": 2},
        {"granularity": "selective", "modules": ("norm", "activation", "core_attention")},
    ),
    "dropout": (DENSE | {"hidden_dropout": 0.2}, {"tp": 2, "sequence_parallel": True}, {}),
    "operations": (
        DEEPSEEK_WITH_ROOM,
        {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1, "pp": 2},
        {"granularity": "operations"},
    ),
    "operations-ring": (
        DENSE,
        {"tp": 2, "cp": 2},
        {"granularity": "operations", "save": ("products", "attention"), "every": 3},
    ),
    "operations-heads-exchanged": (
        DENSE,
        {"cp": 2, "cp_method": "a2a"},
        {"granularity": "operations", "every": 1},
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", DEEPSEEK_CASES)
def test_latent_attention_and_mtp_are_planned_as_they_are(
    case: str, precision: str
) -> None:
    model, parallel, recompute = DEEPSEEK_CASES[case]
    config = make_config(model, {"dp": 1} | parallel, steps=1, precision=precision)
    fields = config.model_dump()
    fields["training"] |= {"seq_length": 64, "micro_batch_size": 1, "recompute": recompute}
    config = TrainConfig.from_mapping(fields)
    for rank in (0, ParallelDims.of(config.parallel).world_size - 1):
        planned = rank_memory(config, rank, CPUS["new"])
        assert (
            planned.parameters_bytes,
            planned.gradients_bytes,
            planned.optimizer_bytes,
        ) == held_bytes(config, rank)
    for cpu in CPUS.values():
        assert_kept(config, cpu, within=0.01)


class CountingPeers:
    """Peers of a job of its own, which count the bytes of means until all are right."""

    group_index = 0
    can_lose = True

    def __init__(self) -> None:
        self.num_bytes = 0

    def meet(self, step: int) -> bool:
        return True

    def mean(self, flat: Tensor) -> None:
        self.num_bytes += size([flat])

    def confirm(self) -> bool:
        return True


@pytest.mark.parametrize("parallel", [{"tp": 2, "dp": 1}, {"dp": 2, "zero": 1}])
def test_means_that_a_job_keeps_are_counted_to_the_byte(parallel: dict[str, int]) -> None:
    fields = make_config(LLAMA, parallel, steps=12).model_dump(exclude_unset=True)
    fields["parallel"]["local_sgd"] = {
        "groups": 2,
        "sync_every": 3,
        "sync_moments_every": {"exp_avg": 4},
        "outer_optimizer": {},
        "rendezvous": {"path": "/nowhere", "group": 0},
    }
    config = TrainConfig.from_mapping(fields)
    dims = ParallelDims.of(config.parallel)
    peers = CountingPeers()
    with world(1, dims.world_size):
        mesh = ParallelMesh.create(dims, World(1, dims.world_size, 0, "meta"))
        _, optimizer = build(config, mesh, peers, initialise=False)
        assert optimizer.group_sync is not None
        # Weights and moments are due together.
        optimizer.group_sync.after_update(12)
    buffers = rank_buffers(config, dims, plan_pipeline(config), 1)
    assert peers.num_bytes == kept_mean_bytes(config, buffers) > 0
