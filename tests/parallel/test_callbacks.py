"""What callbacks measure is the same in every layout, on any device, and goes on after a
resume in another one.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.training.callbacks.assembly import make_callbacks
from megatron_ray.training.callbacks.protocol import CallbackContext
from megatron_ray.training.session import TrainingSession, batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.parallel.test_meta_step import OneToken, world
from tests.support.parity import END, GPT2, LLAMA
from tests.support.ranks import run_ranks
from tests.support.watched_run import WatchedRun, run_watched, watched_config

pytestmark = pytest.mark.parallel

EXPERTS: dict[str, Any] = LLAMA | {
    "num_layers": 3,
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 48,
        "layer_pattern": [1, 0, 1],
    },
    "mtp": {"num_layers": 1, "loss_coeff": 0.3},
}
WINDOWS = LLAMA | {"sliding_window": 5, "full_attention_every": 2}
PARTS: dict[str, Any] = {"separate_documents": True}
STAGES = {"tp": 2, "pp": 2, "sequence_parallel": True, "first_stage_layers": 2}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp2-sp": (WINDOWS, {"tp": 2, "sequence_parallel": True}, PARTS),
    "cp2": (WINDOWS, {"cp": 2}, PARTS),
    "pp2-tied": (GPT2, {"pp": 2}, {}),
    "ep2-zero1": (EXPERTS, {"dp": 2, "ep": 2}, {}),
    "zero3": (EXPERTS, {"dp": 2, "zero": 3}, {}),
}
MORE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp2": (GPT2, {"tp": 2}, PARTS),
    "zero0": (LLAMA, {"dp": 2, "zero": 0}, PARTS),
    "cp2-a2a": (LLAMA, {"cp": 2, "cp_method": "a2a"}, PARTS),
    "tp2-pp2": (EXPERTS, STAGES, {}),
    "tp2-cp2-zero3": (LLAMA, {"tp": 2, "cp": 2, "zero": 3}, PARTS),
    "kv-heads": (LLAMA | {"num_query_groups": 1}, {"tp": 2}, {}),
}
CASES = [
    *LAYOUTS,
    *[pytest.param(name, marks=pytest.mark.parity) for name in MORE],
]


@cache
def run(name: str, *, alone: bool) -> list[WatchedRun]:
    model, parallel, settings = (LAYOUTS | MORE)[name]
    if alone:
        parallel = {}
    config = watched_config(model, parallel, **settings)
    ranks = ParallelDims.of(config.parallel).world_size
    runs: list[WatchedRun] = run_ranks(run_watched, ranks, config)
    return runs


@pytest.mark.parametrize("name", CASES)
def test_every_layout_measures_what_one_rank_does(name: str) -> None:
    (one,) = run(name, alone=True)
    assert list(one.numbers) == [1, 2]
    for result in run(name, alone=False):
        for step, numbers in one.numbers.items():
            measured = result.numbers[step]
            assert list(measured) == list(numbers)
            assert measured == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize(
    "parallel", [STAGES, {"cp": 2, "dp": 2}], ids=["tp2-pp2", "cp2-dp2"]
)
def test_a_measured_step_never_waits_for_the_device(parallel: dict[str, Any]) -> None:
    config = watched_config(EXPERTS | {"moe": None}, parallel, micro_batch=1, **PARTS)
    dims = ParallelDims.of(config.parallel)
    rank = dims.world_size - 1
    with world(rank, dims.world_size):
        mesh = ParallelMesh.create(dims, World(rank, dims.world_size, 0, "meta"))
        model, optimizer = build(config, mesh, initialise=False)
        callbacks = make_callbacks(CallbackContext(config, mesh, model, optimizer))
        training = config.training
        loader = StepLoader(
            OneToken(training.seq_length),
            1,
            training.global_batch_size,
            mesh.dp_rank,
            dims.dp,
            batch_maker(config, mesh, END),
        )
        batches = loader.step(0)
        callbacks.begin_step(1, batches)
        loss = forward_backward(model, mesh, batches)
        sums = reduce_step(model, optimizer, mesh, loss, 1)
        callbacks.after_backward(sums)
        scale_and_clip(optimizer, sums, 1.0)
        optimizer.step(1e-3)
        monitored = callbacks.after_update()
    assert monitored is not None
    assert monitored.values.device.type == "meta"
    assert monitored.values.shape == (len(monitored.names),)


def resumable(folder: Path, **parallel: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "ffn_hidden_size": 64,
                "max_sequence_length": 32,
                "vocab_multiple": 64,
            },
            "parallel": {"dp": 1} | parallel,
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(folder / "cache"),
            },
            "training": {"seq_length": 32, "global_batch_size": 4, "steps": 6},
            "optimizer": {"lr": 0.01},
            "callbacks": {"unigram": {"every_steps": 3}},
            "checkpoint": {"every_steps": 4},
            "storage": {"path": str(folder / "runs")},
        }
    )


def watch_session(
    rank: int,
    world_size: int,
    config: TrainConfig,
    data: PreparedData,
    attempt: int,
    resume_from: str | None,
) -> dict[int, dict[str, float]]:
    torch.set_num_threads(1)
    mesh = ParallelMesh.create(
        ParallelDims.of(config.parallel), World(rank, world_size, rank, "cpu")
    )
    run = WatchedRun()
    TrainingSession(
        config, mesh, data, report=run.note, attempt=attempt, resume_from=resume_from
    ).run()
    return run.numbers


def test_counts_of_labels_go_on_in_another_layout(tmp_path: Path) -> None:
    config = resumable(tmp_path, dp=2)
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over it\n" * 300)
    data = prepare(config.data, str(tmp_path / "cache"), seq_length=32)
    whole = run_ranks(watch_session, 2, config, data, 1, None)[0]
    (first, _) = list_checkpoints(str(tmp_path / "runs"))
    commit(first.path, {}, [])
    other = resumable(tmp_path, tp=2)
    resumed = run_ranks(watch_session, 2, other, data, 2, first.path)[0]
    assert list(resumed) == [6]
    for name in ("unigram_entropy", "unigram_tokens"):
        assert resumed[6][name] == whole[6][name]
    assert resumed[6] == pytest.approx(whole[6], rel=1e-5)
