"""What is frozen costs no gradient, no reduction and no state, stays as it is in every
layout, and is in the checkpoint all the same.
"""

from collections import Counter
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ray.checkpoint.directory import FORMAT_VERSION, commit
from megatron_ray.checkpoint.writer import CheckpointWriter
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import parallelize
from megatron_ray.training.saving import resume
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.parity import (
    GPT2,
    LLAMA,
    RandomDataset,
    RankResult,
    assemble,
    make_config,
    make_mesh,
    run_layout,
)
from tests.support.products import Products, Shape, linear_layers
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
TOKENS = 32
HALF = ("embedding.weight", "layers.0.*")
"""Of two layers and an untied head; as much as the other half but for the last norm."""


def frozen_config(
    parallel: dict[str, Any],
    freeze: tuple[str, ...] = HALF,
    model: dict[str, Any] = LLAMA,
    **more: Any,
) -> TrainConfig:
    config = make_config(
        model, {"dp": 1, "bucket_elements": 8000} | parallel, steps=6, **more
    )
    return config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"freeze": freeze})}
    )


Step = tuple[int, Counter[Shape], list[tuple[int, int]]]
"""Bytes of gradients whose reduction started, the products, the linear layers that are
trained."""


def steps(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Step]:
    mesh = make_mesh(rank, world_size, configs[0])
    return [one_step(config, mesh) for config in configs]


def one_step(config: TrainConfig, mesh: ParallelMesh) -> Step:
    reduced: list[int] = []
    model = parallelize(
        config,
        mesh,
        on_reduce=lambda bucket: reduced.append(4 * (bucket.end - bucket.start)),
    )
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, TOKENS),
        1,
        4,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh),
    )
    with Products() as products:
        forward_backward(model, mesh, loader.step(0))
    for family in model.parameter_groups:
        family.reducer.finish()
    return sum(reduced), products.linear, linear_layers(model.module, trained_only=True)


def test_half_of_the_model_has_half_of_the_gradients_and_of_their_products() -> None:
    configs = [
        frozen_config({"dp": 2, "zero": zero}, freeze, micro_batch=1)
        for zero in (0, 1)
        for freeze in ((), HALF)
    ]
    ranks = run_ranks(steps, 2, configs)
    for (every_byte, _, layers), (bytes_, products, trained) in (
        pair for rank in ranks for pair in (rank[:2], rank[2:])
    ):
        assert bytes_ == pytest.approx(every_byte / 2, rel=0.01)
        assert 0 < len(trained) < len(layers)
        expected = Counter((TOKENS, inputs, outputs) for outputs, inputs in layers)
        expected += Counter(
            (TOKENS, outputs, inputs) for outputs, inputs in trained
        )  # nothing below them needs a gradient
        expected += Counter((outputs, TOKENS, inputs) for outputs, inputs in trained)
        assert products == expected + expected, "two microbatches"


MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (LLAMA, HALF),
    "gpt2": (GPT2, (*HALF, "position_embedding.weight")),
}
"""Each with what is frozen; GPT-2's head is tied to the frozen embedding."""


@cache
def reference(model: str) -> RankResult:
    shape, frozen = MODELS[model]
    results: list[RankResult] = run_ranks(run_layout, 1, frozen_config({}, frozen, shape))
    return results[0]


@pytest.mark.parametrize(
    ("model", "parallel", "world"),
    [
        ("llama", {"dp": 2}, 2),
        ("llama", {"tp": 2, "sequence_parallel": True}, 2),
        ("llama", {"pp": 2, "schedule": "zb-h1", "dp": 2, "zero": 0}, 4),
        ("llama", {"dp": 2, "zero": 3}, 2),
        ("gpt2", {"dp": 2}, 2),
        ("gpt2", {"pp": 2}, 2),
    ],
    ids=[
        "llama-dp2-zero1",
        "llama-tp2-sp",
        "llama-pp2-zb-dp2-zero0",
        "llama-dp2-zero3",
        "gpt2-dp2-zero1",
        "gpt2-pp2",
    ],
)
def test_what_is_frozen_stays_and_the_rest_learns_as_on_one_rank(
    model: str, parallel: dict[str, Any], world: int
) -> None:
    """In the pipelines all of the first stage is frozen."""
    (shape, freeze) = MODELS[model]
    one = reference(model)
    config = frozen_config(parallel, freeze, shape)
    ranks: list[RankResult] = run_ranks(run_layout, world, config)
    for result in ranks:
        np.testing.assert_allclose(result.losses, one.losses, rtol=1e-5)
        np.testing.assert_allclose(result.grad_norms, one.grad_norms, rtol=1e-5)
    before, after, expected = (
        assemble(config, boxes)
        for boxes in ([one.initial], [r.weights for r in ranks], [one.weights])
    )
    for name, values in after.items():
        frozen = any(fnmatchcase(name, pattern) for pattern in freeze)
        assert np.array_equal(values, before[name]) == frozen, name
        assert np.abs(values - expected[name]).max() <= 1e-5, name
    trained = sum(
        values.size
        for name, values in after.items()
        if not np.array_equal(values, before[name])
    )
    assert sum(len(result.gradients) > 0 for result in ranks) == (
        world // 2 if "pp" in parallel else world
    )
    assert one.state_bytes == pytest.approx(2 * 4 * trained, rel=0.15), (
        "moments of what is trained, and padding"
    )


BUT_SOME_EXPERTS = (
    "embedding.*",
    "layers.0.[!m]*",
    "layers.0.mlp_norm.*",
    "*.router.*",
    "*.down.*",
    "layers.1.*",
    "final_norm.*",
    "head.*",
)


@pytest.mark.parametrize(
    "freeze", [("*.experts.*",), BUT_SOME_EXPERTS], ids=["experts", "all-but-some-experts"]
)
def test_experts_may_be_frozen_or_trained_alone(freeze: tuple[str, ...]) -> None:
    model = LLAMA | {
        "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "aux_loss_coeff": 0.02}
    }
    config = frozen_config({"dp": 2, "ep": 2}, freeze, model)
    ranks: list[RankResult] = run_ranks(run_layout, 2, config)
    before, after = (
        assemble(config, boxes)
        for boxes in ([r.initial for r in ranks], [r.weights for r in ranks])
    )
    for name, values in after.items():
        assert np.array_equal(values, before[name]) == any(
            fnmatchcase(name, pattern) for pattern in freeze
        ), name


def save(
    rank: int, world_size: int, config: TrainConfig, path: str
) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    """Trains one step and saves; this rank's weights, in fp32."""
    mesh = make_mesh(rank, world_size, config)
    model, optimizer = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, TOKENS),
        2,
        8,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh),
    )
    stats = reduce_step(
        model,
        optimizer,
        mesh,
        forward_backward(model, mesh, loader.step(0)),
        8 * TOKENS // mesh.dims.dp,
    )
    scale_and_clip(optimizer, stats, 1.0)
    optimizer.step(0.01)
    writer = CheckpointWriter(mesh, "sync", lambda report: None)
    writer.save(
        1,
        path,
        optimizer.sharded_state(),
        {
            "format_version": FORMAT_VERSION,
            "step": 1,
            "consumed_samples": 8,
            "config": config.model_dump(mode="json"),
        },
    )
    writer.close()
    return weights(optimizer)


def load(
    rank: int, world_size: int, config: TrainConfig, path: str
) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    model, optimizer = build(config, make_mesh(rank, world_size, config), initialise=False)
    resume(path, model, optimizer, {}, rank)
    return weights(optimizer)


def weights(optimizer: ShardedOptimizer) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    state = optimizer.sharded_state()
    entries = [
        (name.removeprefix("model/"), entry)
        for name, entry in state.items()
        if name.startswith("model/")
    ]
    return [
        (name, shard.box.offset, shard.tensor.float().numpy())
        for name, entry in entries
        for shard in entry.boxes
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_has_what_is_frozen_too(tmp_path: Path, precision: str) -> None:
    written = frozen_config({"dp": 2}, precision=precision)
    before = assemble(written, run_ranks(save, 2, written, str(tmp_path)))
    commit(str(tmp_path), {}, [])
    for parallel in ({"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}):
        read = frozen_config(parallel, precision=precision)
        after = assemble(read, run_ranks(load, 2, read, str(tmp_path)))
        assert all(
            np.array_equal(after[name], values) and np.any(values)
            for name, values in before.items()
        ), parallel
