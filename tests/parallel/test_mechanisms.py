"""The mechanisms are what they are called: overlap happens, ZeRO-1 shards, a resumed
run is the undisturbed one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.checkpoint.directory import commit
from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.data_parallel.buffers import GradReducer
from megatron_ray.distributed.collectives import Pending
from megatron_ray.ops.weight_grad import GradSlot
from megatron_ray.parallelize.parallelize import parallelize
from megatron_ray.reports import CheckpointReport, Report, StepReport
from megatron_ray.sharding.buckets import ALIGNMENT
from megatron_ray.training.session import TrainingSession, batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.parity import (
    LLAMA,
    RandomDataset,
    boxes,
    make_config,
    make_mesh,
    run_layout,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel


def record_overlap(
    rank: int, world_size: int, config: TrainConfig
) -> tuple[list[str], int, list[str]]:
    """Events of one step's backward, in order; the number of buckets; what was waited
    for inside the backward.
    """
    mesh = make_mesh(rank, world_size, config)
    events: list[str] = []
    model = parallelize(
        config, mesh, on_reduce=lambda bucket: events.append(f"reduce {bucket.index}")
    )
    reducer = model.parameter_groups[0].reducer
    assert isinstance(reducer, GradReducer)
    waits = []
    ready = reducer.ready

    class Watched:
        def __init__(self, pending: Pending) -> None:
            self.pending = pending

        def wait(self) -> None:
            waits.append("wait")
            self.pending.wait()

        def is_completed(self) -> bool:
            return self.pending.is_completed()

    def note(slot: GradSlot) -> None:
        events.append(f"ready {slot.name}")
        ready(slot)
        reducer._pending = [
            pending if isinstance(pending, Watched) else Watched(pending)
            for pending in reducer._pending
        ]

    model.sink._on_ready = note
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32),
        2,
        8,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh),
    )
    forward_backward(model, mesh, loader.step(0))
    inside = list(waits)
    reducer.finish()
    return events, len(reducer.buffers.plan.buckets), inside


@pytest.mark.parametrize("zero", [0, 1])
def test_buckets_are_reduced_while_the_backward_goes_on(zero: int) -> None:
    config = make_config(LLAMA, {"dp": 2, "zero": zero, "bucket_elements": 8000}, steps=1)
    for events, num_buckets, waits_inside in run_ranks(record_overlap, 2, config):
        assert num_buckets > 3
        last_ready = max(
            index for index, event in enumerate(events) if event.startswith("ready")
        )
        before = [event for event in events[:last_ready] if event.startswith("reduce")]
        assert before == [f"reduce {index}" for index in range(num_buckets - 1)]
        assert waits_inside == []


def deferred_rows(
    rank: int, world_size: int, config: TrainConfig
) -> tuple[dict[str, int], dict[str, bool]]:
    """Rows of the inputs that wait for their weight products, and whether the gradients
    that come of it are those of a backward at once.
    """
    mesh = make_mesh(rank, world_size, config)
    model, _ = build(config, mesh)
    batches = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 2, 0, 1, batch_maker(config, mesh)
    ).step(0)
    forward_backward(model, mesh, batches)
    at_once = {name: slot.main_grad.clone() for name, slot in model.sink.slots.items()}
    waiting: dict[str, int] = {}
    contribute = model.sink.contribute

    def note(slot: GradSlot, accumulate: Any) -> None:
        operands = [*accumulate.args, *accumulate.keywords.values()]
        tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
        # The output gradient, which is among them, is of all tokens.
        waiting[slot.name] = min(len(tensor) for tensor in tensors)
        contribute(slot, accumulate)

    model.begin_step()
    model.sink.contribute = note  # type: ignore[method-assign]
    model.sink.begin_microbatch(last=False, defer_to="all")
    model.module(batches[0]).backward()
    model.sink.run_deferred("all", last=True)
    return waiting, {
        name: torch.equal(slot.main_grad, at_once[name])
        for name, slot in model.sink.slots.items()
    }


def test_weight_products_that_wait_hold_no_gathered_inputs() -> None:
    config = make_config(LLAMA, {"tp": 2, "sequence_parallel": True}, steps=1)
    for waiting, equal in run_ranks(deferred_rows, 2, config):
        inside = {
            name: rows
            for name, rows in waiting.items()
            if name.startswith("layers.") and "norm" not in name
        }
        # What is cut over tp anyway stays whole in tokens; what would be whole in both
        # is gathered when it is needed.
        assert {name.split(".", 2)[2]: rows for name, rows in inside.items()} == {
            "attention.qkv.weight": 32,
            "attention.o.weight": 64,
            "mlp.gate_up.weight": 32,
            "mlp.down.weight": 64,
        }
        assert all(equal.values())


def test_zero1_state_is_a_share_of_the_whole() -> None:
    def state_bytes(parallel: dict[str, Any]) -> list[int]:
        config = make_config(LLAMA, parallel, steps=1)
        return [
            result.state_bytes
            for result in run_ranks(run_layout, int(parallel["dp"]), config)
        ]

    (total,) = state_bytes({"dp": 1})
    padding = 2 * 4 * ALIGNMENT * 4
    assert all(size <= total / 4 + padding for size in state_bytes({"dp": 4}))
    assert all(size >= total for size in state_bytes({"dp": 2, "zero": 0}))


def test_a_gradient_that_never_came_is_an_error() -> None:
    config = make_config(LLAMA, {"dp": 1}, steps=1)
    mesh = make_mesh(0, 1, config)
    model, optimizer = build(config, mesh)
    model.begin_step()
    with pytest.raises(
        RuntimeError, match="1 gradient buckets were never complete; the first holds"
    ):
        reduce_step(model, optimizer, mesh, torch.zeros(()), 1)


def train_session(
    rank: int,
    world_size: int,
    config: TrainConfig,
    data: PreparedData,
    resume_from: str | None,
    stop_at: int | None,
) -> tuple[
    list[float], list[float], list[tuple[str, tuple[int, ...], np.ndarray]], list[str], str
]:
    """Losses, norms, final weights, checkpoints written, outcome."""
    reports: list[Report] = []

    def poll() -> Command:
        steps = [report.step for report in reports if isinstance(report, StepReport)]
        asked = stop_at is not None and rank == 0 and steps and steps[-1] + 1 >= stop_at
        return Command.CHECKPOINT_AND_STOP if asked else Command.CONTINUE

    session = TrainingSession(
        config,
        make_mesh(rank, world_size, config),
        data,
        report=reports.append,
        poll=poll,
        resume_from=resume_from,
    )
    outcome = session.run()
    steps = [report for report in reports if isinstance(report, StepReport)]
    written = [report.path for report in reports if isinstance(report, CheckpointReport)]
    weights = boxes(session.optimizer.sharded_state(), "model/")
    return [r.loss for r in steps], [r.grad_norm for r in steps], weights, written, outcome


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, PreparedData]:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        (folder / f"{index}.txt").write_text(
            " ".join(str(index * number % 97) for number in range(300))
        )
    config = make_config(LLAMA | {"vocab_size": None}, {"dp": 1}, steps=10)
    fields = config.model_dump()
    fields["data"] = {"train": [{"path": str(folder)}], "tokenizer": {"kind": "bytes"}}
    fields["training"]["eval_samples"] = 4
    fields["storage"] = {"path": str(folder / "out")}
    config = TrainConfig.from_mapping(fields)
    return config, prepare(config.data, str(folder / "cache"), seq_length=32)


def with_layout(
    config: TrainConfig, storage: Path, parallel: dict[str, Any], **training: Any
) -> TrainConfig:
    fields = config.model_dump()
    fields["parallel"] |= {"dp": 1} | parallel
    fields["storage"] = {"path": str(storage)}
    fields["training"] |= training
    fields["checkpoint"] = {"every_steps": 5, "keep_last": 5}
    return TrainConfig.from_mapping(fields)


RECOMPUTE = {"granularity": "full", "method": "uniform", "num_layers": 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [{"tp": 2, "sequence_parallel": True}, {"dp": 2}])
def test_a_resumed_run_is_the_undisturbed_one(
    corpus: tuple[TrainConfig, PreparedData],
    tmp_path: Path,
    parallel: dict[str, Any],
    precision: str,
) -> None:
    config, data = corpus
    config = with_layout(config, tmp_path, parallel, precision=precision)
    again = config
    if (
        precision == "bf16"
    ):  # with dropout, whose masks are those of the undisturbed run, recomputed or not
        model = config.model.model_copy(
            update={"hidden_dropout": 0.1, "attention_dropout": 0.1}
        )
        config = config.model_copy(update={"model": model})
        again = with_layout(
            config, tmp_path, parallel, precision=precision, recompute=RECOMPUTE
        )
    whole = run_ranks(train_session, 2, config, data, None, None)
    losses, norms, _, written, outcome = whole[0]
    assert outcome == "finished"
    assert [path[-11:] for path in written] == [
        "00005-a0001",
        "00010-a0001",
    ]
    commit(written[0], {}, [])
    resumed = run_ranks(train_session, 2, again, data, written[0], None)
    for before, after in zip(whole, resumed, strict=True):
        assert after[0] == before[0][5:]
        assert after[1] == before[1][5:]
        assert all(
            np.array_equal(a[2], b[2]) for a, b in zip(before[2], after[2], strict=True)
        )
    if precision == "fp32":
        other = {"dp": 2} if "tp" in parallel else {"tp": 2}
        crossed = run_ranks(
            train_session,
            2,
            with_layout(config, tmp_path, {"tp": 1, "sequence_parallel": False} | other),
            data,
            written[0],
            None,
        )
        np.testing.assert_allclose(crossed[0][0], losses[5:], rtol=1e-5)
        np.testing.assert_allclose(crossed[0][1], norms[5:], rtol=1e-5)


def test_all_ranks_stop_at_the_step_that_one_asked_for(
    corpus: tuple[TrainConfig, PreparedData], tmp_path: Path
) -> None:
    config, data = corpus
    config = with_layout(config, tmp_path, {"tp": 2})
    for losses, _, _, written, outcome in run_ranks(
        train_session, 2, config, data, None, 7
    ):
        assert outcome == "stopped"
        assert len(losses) == 7
        assert [path[-11:] for path in written] == ["00005-a0001", "00007-a0001"]


def test_a_bpe_that_ended_with_fewer_tokens_than_asked_for_trains(
    corpus: tuple[TrainConfig, PreparedData], tmp_path: Path
) -> None:
    config, data = corpus
    fields = with_layout(config, tmp_path, {}, steps=1).model_dump()
    fields["data"]["tokenizer"] = {"kind": "bpe", "vocab_size": 4096}
    session = TrainingSession(
        TrainConfig.from_mapping(fields), make_mesh(0, 1, config), data
    )
    assert session.config.model.vocab_size == data.vocab_size < 4096
    assert session.run() == "finished"
