"""Steps that are replayed equal those whose kernels are launched one by one, to the bit.

Recordings are frozen (see tests.support.frozen_recording), so a step that depends on what
its passes do in Python differs here as it would on a GPU.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.datasets import EvaluationSource
from megatron_ray.data.loader import StepLoader
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.models.batch import Batch
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import EvalReport, Report, SkippedStepReport, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.evaluate import Evaluation
from megatron_ray.training.graphs.passes import RecordedPasses
from megatron_ray.training.profiling.profiler import NO_PROFILER
from megatron_ray.training.progress import Progress
from megatron_ray.training.rules.checks import Recheck
from megatron_ray.training.rules.run import train_by_rules
from megatron_ray.training.session import TrainingSession, build
from megatron_ray.validation import check
from tests.support.frozen_recording import FrozenRecording
from tests.support.parity import (
    GPT2,
    LLAMA,
    NoSaver,
    boxes,
    make_config,
    make_mesh,
    random_loader,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
STEPS = 7
BAD = 5
"""A step with an infinite weight in its loss."""
WARMUP = 2
MOE = LLAMA | {
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 48,
        "score_function": "sigmoid",
        "expert_bias": True,
        "aux_loss_coeff": 0.02,
        "z_loss_coeff": 1e-3,
        "capacity_factor": 1.25,
        "pad_to_capacity": True,
    },
    "mtp": {"num_layers": 1},
}
FP8 = LLAMA | {"hidden_size": 64, "ffn_hidden_size": 128, "num_query_groups": 4}


@dataclass(frozen=True)
class Case:
    """A model in a layout, and further fields of training."""

    model: dict[str, Any]
    parallel: dict[str, Any]
    training: dict[str, Any]

    def config(self, *, graph: bool) -> TrainConfig:
        parallel = {"dp": 1, "bucket_elements": 8000} | self.parallel
        fields = make_config(self.model, parallel, steps=STEPS).model_dump(mode="json")
        fields["data"]["tokenizer"] = {"kind": "bytes"}
        fields["training"] |= {"max_skipped_steps": 1} | self.training
        if graph:
            fields["training"]["cuda_graph"] = {"warmup_steps": WARMUP}
        config = TrainConfig.from_mapping(fields)
        assert check.find_problems(config) == []
        return config


class BadStep(StepLoader):
    """A loader in which one token of the first replica has an infinite weight once."""

    def step(self, consumed_samples: int) -> list[Batch]:
        (first, *rest) = super().step(consumed_samples)
        if consumed_samples // 8 + 1 == BAD and self.dp_rank == 0:
            mask = first.loss_mask_BS.clone()
            mask[0, 0] = torch.inf
            first = replace(first, loss_mask_BS=mask)
        return [first, *rest]


Result = dict[str, Any]


def run_case(rank: int, world_size: int, config: TrainConfig) -> Result:
    mesh = make_mesh(rank, world_size, config)
    loader = random_loader(config, mesh, BadStep)
    model, optimizer = build(config, mesh)
    evaluation = Evaluation(
        [EvaluationSource("held-out", loader.dataset, 4, in_blend=True)],
        lambda: [(0, batch) for batch in StepLoader.step(loader, 8000)[:2]],
    )
    components = TrainingComponents(
        config, mesh, model, optimizer, loader, evaluation, NoSaver()
    )
    graph = config.training.cuda_graph
    recordings = list[FrozenRecording]()

    def record(work: Any) -> FrozenRecording:
        recordings.append(FrozenRecording(work))
        return recordings[-1]

    if graph is not None:
        passes = RecordedPasses(model, mesh, graph.warmup_steps, record)
        vars(components)["passes"] = passes
    reports: list[Report] = []
    train_by_rules(
        components,
        Progress(),
        reports.append,
        lambda: Command.CONTINUE,
        NO_PROFILER,
        Recheck(),
    )
    steps = [report for report in reports if isinstance(report, StepReport)]
    return {
        "numbers": [
            (report.step, report.loss, report.grad_norm, report.loss_scale)
            for report in steps
        ],
        "others": [report.other_losses for report in steps],
        "splits": [report.split_s for report in steps],
        "times": [report.step_s for report in steps],
        "skipped": [
            report.step for report in reports if isinstance(report, SkippedStepReport)
        ],
        "evaluations": [
            (report.step, report.loss)
            for report in reports
            if isinstance(report, EvalReport)
        ],
        "replays": [recording.replays for recording in recordings],
        "state": boxes(optimizer.sharded_state()),
        "biases": [bias.value.numpy() for bias in model.expert_biases.values()],
    }


def run_cases(rank: int, world_size: int, cases: list[Case]) -> list[tuple[Result, Result]]:
    """Of each case the plain run and the replayed one."""
    torch.set_num_threads(1)
    results = []
    for case in cases:
        plain, replayed = (
            run_case(rank, world_size, case.config(graph=graph)) for graph in (False, True)
        )
        results.append((plain, replayed))
    return results


EVALUATED = {"eval_every_steps": 2}
BF16 = {"precision": "bf16"}
ONE_RANK = {
    "llama-fp32": Case(LLAMA, {}, EVALUATED),
    "llama-bf16": Case(LLAMA, {}, EVALUATED | BF16),
    "one-microbatch": Case(GPT2, {}, {"micro_batch_size": 8}),
    "fp16": Case(LLAMA, {}, {"precision": "fp16"}),
    "bf16-sums": Case(GPT2, {}, BF16 | {"grad_reduce_in_fp32": False}),
    "experts": Case(MOE, {}, EVALUATED),
    "fp8-delayed": Case(FP8, {}, EVALUATED | BF16 | {"fp8": {"recipe": "delayed"}}),
    "whole-layers": Case(
        MOE,
        {},
        {"recompute": {"granularity": "full", "method": "uniform", "num_layers": 1}},
    ),
    "modules": Case(
        LLAMA,
        {},
        {"recompute": {"granularity": "selective", "modules": ["norm", "mlp"]}},
    ),
    "operations": Case(MOE, {}, {"recompute": {"granularity": "operations"}}),
    "checked-gradients": Case(
        LLAMA,
        {},
        {"rules": [{"when": "not_finite", "before_reduction": True, "action": "skip"}]},
    ),
}
TP2 = {"tp": 2, "sequence_parallel": True}
TWO_RANKS = {
    "dp2": Case(LLAMA, {"dp": 2}, EVALUATED | BF16),
    "dp2-zero0": Case(GPT2, {"dp": 2, "zero": 0}, {}),
    "tp2": Case(LLAMA, TP2, EVALUATED),
    "tp2-overlap": Case(LLAMA, TP2 | {"tp_comm_overlap": True}, BF16),
    "cp2": Case(LLAMA, {"cp": 2}, {}),
    "cp2-a2a": Case(LLAMA, {"cp": 2, "cp_method": "a2a"}, {}),
    "local-sgd": Case(LLAMA, {"dp": 2, "local_sgd": {"groups": 2, "sync_every": 2}}, {}),
    "ep2": Case(MOE, {"dp": 2, "ep": 2}, EVALUATED),
    "ep2-allgather": Case(MOE, {"dp": 2, "ep": 2, "dispatcher": "allgather"}, {}),
}


def assert_equal(plain: Result, replayed: Result, reruns: int = 0) -> None:
    assert plain["replays"] == []
    # The recording itself is the first replay, and does the work in a frozen one.
    assert replayed["replays"] == [STEPS - WARMUP - 1 + reruns]
    assert [step for step, *_ in plain["numbers"]] == list(range(1, STEPS + 1))
    for name in ("numbers", "others", "evaluations"):
        assert repr(replayed[name]) == repr(plain[name]), name
    assert replayed["skipped"] == plain["skipped"]
    assert BAD in plain["skipped"]
    for (name, _, values), (same_name, _, others) in zip(
        plain["state"], replayed["state"], strict=True
    ):
        assert name == same_name
        assert np.array_equal(values, others), name
    for bias, other in zip(plain["biases"], replayed["biases"], strict=True):
        assert np.array_equal(bias, other)
    for split, time in zip(replayed["splits"], replayed["times"], strict=True):
        assert sum(split.values()) == pytest.approx(time)
    for split in replayed["splits"][WARMUP:]:
        assert split["forward"] == 0
        assert split["backward"] > 0


def named(cases: dict[str, Case], long_forms: set[str]) -> list[Any]:
    return [
        pytest.param(case, id=name, marks=[pytest.mark.parity] * (name in long_forms))
        for name, case in cases.items()
    ]


@pytest.mark.parametrize("case", named(ONE_RANK, {"one-microbatch", "modules"}))
def test_no_bit_changes_on_one_rank(case: Case) -> None:
    ((results,),) = run_ranks(run_cases, 1, [case])
    assert_equal(*results)


@pytest.mark.parametrize(
    "case", named(TWO_RANKS, {"dp2-zero0", "tp2-overlap", "cp2-a2a", "ep2-allgather"})
)
def test_no_bit_changes_on_two_ranks(case: Case) -> None:
    for (results,) in run_ranks(run_cases, 2, [case]):
        assert_equal(*results)


def test_a_step_that_is_computed_again_is_replayed_again() -> None:
    rule = {"when": "large_grad_norm", "limit": 1e9, "rerun": True, "action": "skip"}
    fault = {"kind": "transient", "breaks": "large_grad_norm", "steps": [6]}
    case = Case(LLAMA, {}, {"rules": [rule], "inject_faults": [fault]})
    (((plain, replayed),),) = run_ranks(run_cases, 1, [case])
    assert_equal(plain, replayed, reruns=1)


def session_config(folder: Path, **training: Any) -> TrainConfig:
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
            "parallel": {"dp": 2},
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(folder / "cache"),
            },
            "training": {
                "seq_length": 32,
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "steps": 8,
            }
            | training,
            "optimizer": {"lr": 0.01},
            "checkpoint": {"every_steps": 4},
            "storage": {"path": str(folder / "run")},
        }
    )


def run_session(
    rank: int,
    world_size: int,
    config: TrainConfig,
    data: PreparedData,
    attempt: int,
    resume_from: str | None = None,
) -> dict[int, tuple[float, float]]:
    mesh = ParallelMesh.create(
        ParallelDims.of(config.parallel), World(rank, world_size, rank, "cpu")
    )
    reports: list[Report] = []
    session = TrainingSession(
        config,
        mesh,
        data,
        report=reports.append,
        attempt=attempt,
        resume_from=resume_from,
    )
    session.run()
    passes = session._components.passes
    assert isinstance(passes, RecordedPasses) == (config.training.cuda_graph is not None)
    if isinstance(passes, RecordedPasses):
        assert passes._recording is None, "communicators may be closed now"
    steps = [report for report in reports if isinstance(report, StepReport)]
    return {report.step: (report.loss, report.grad_norm) for report in steps}


def test_a_run_that_resumes_records_again_and_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(
        "\n".join(f"line {number}: {number * number} is a square" for number in range(400))
    )
    plain = session_config(tmp_path)
    graphed = session_config(tmp_path, cuda_graph={"warmup_steps": 2})
    data = prepare(plain.data, str(tmp_path / "cache"), seq_length=32)
    (whole, _) = run_ranks(run_session, 2, plain, data, 1)
    half = list_checkpoints(str(tmp_path / "run"))[0].path
    commit(half, {}, [])
    for attempt, config in enumerate((graphed, plain), 2):
        (resumed, _) = run_ranks(run_session, 2, config, data, attempt, half)
        assert resumed == {step: whole[step] for step in range(5, 9)}
    (replayed, _) = run_ranks(run_session, 2, graphed, data, 4)
    assert replayed == whole
