"""A run's checkpoints end to end: resume is bit-exact in the same layout, goes on in
another, and one process can speak from them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.checkpoint.directory import commit, latest_committed, list_checkpoints
from megatron_ray.checkpoint.hf.exporting import export_folder
from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.optimizer_kinds import BUILT_IN
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.inference.generate import generate, load_model
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import EvalReport, Report, StepReport
from megatron_ray.training.reporting.step_reporter import NonFiniteLossError
from megatron_ray.training.session import TrainingSession
from tests.support.corpus_files import prepare_squares, write_prepared

pytestmark = pytest.mark.parallel
Run = Callable[..., list[Any]]

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "max_sequence_length": 32,
    "vocab_multiple": 64,
}


def config(folder: Path, tp: int, dp: int, **parallel: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": MODEL,
            "parallel": {"tp": tp, "dp": dp, "sequence_parallel": tp > 1, **parallel},
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
            },
            "optimizer": {"lr": 0.01},
            # The path of the text differs between folders, not the text.
            "checkpoint": {"every_steps": 4, "resume_changes": ["data.train"]},
            "storage": {"path": str(folder / f"tp{tp}")},
        }
    )


def train(
    rank: int,
    world_size: int,
    settings: TrainConfig,
    data: PreparedData,
    attempt: int,
    resume_from: str | None,
) -> Any:
    """Losses, norms and scales by step, as rank 0 saw them; 0 is the evaluation at the
    end.
    """
    dims = ParallelDims.of(settings.parallel)
    reports: list[Report] = []
    mesh = ParallelMesh.create(dims, World(rank, world_size, rank, "cpu"))
    TrainingSession(
        settings,
        mesh,
        data,
        report=reports.append,
        attempt=attempt,
        resume_from=resume_from,
    ).run()
    steps = {
        report.step: (report.loss, report.grad_norm, report.loss_scale or 1.0)
        for report in reports
        if isinstance(report, StepReport)
    }
    return steps | dict(
        [
            (0, (report.loss, 0.0, 1.0))
            for report in reports
            if isinstance(report, EvalReport)
        ][-1:]
    )


def goes_on_here_and_elsewhere(
    run: Run,
    settings: TrainConfig,
    elsewhere: TrainConfig,
    data: PreparedData,
    *,
    rel: float,
) -> tuple[dict[int, Any], str]:
    """A whole run, and its checkpoint halfway, from which it goes on bit for bit as it
    is and, to `rel`, in another layout.
    """
    here, there = (
        ParallelDims.of(each.parallel).world_size for each in (settings, elsewhere)
    )
    whole = run(train, here, settings, data, 1, None)[0]
    assert settings.storage is not None
    (half, _) = [info.path for info in list_checkpoints(settings.storage.path)]
    commit(half, {}, [])
    again = run(train, here, settings, data, 2, half)[0]
    assert again == {step: whole[step] for step in (0, *range(5, 9))}, "bit for bit"
    for step, values in run(train, there, elsewhere, data, 3, half)[0].items():
        assert values == pytest.approx(whole[step], rel=rel), "the evaluation too"
    return whole, half


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedData:
    return prepare_squares(config(tmp_path, 1, 1).data)


def diverge(
    rank: int, world_size: int, settings: TrainConfig, data: PreparedData
) -> tuple[str, list[int]]:
    """What ended the run, and the steps that were reported."""
    reports: list[Report] = []
    mesh = ParallelMesh.create(
        ParallelDims.for_world(world_size, tp=2), World(rank, world_size, rank, "cpu")
    )
    try:
        TrainingSession(
            settings, mesh, data, report=reports.append, attempt=1, resume_from=None
        ).run()
    except NonFiniteLossError as problem:
        return str(problem), [
            report.step for report in reports if isinstance(report, StepReport)
        ]
    return "it went on", []


def test_a_loss_that_is_no_number_ends_the_run_on_every_rank_and_is_never_saved(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    settings = config(tmp_path, 2, 1)
    settings = settings.model_copy(
        update={
            "optimizer": settings.optimizer.model_copy(update={"lr": 1e30}),
            "checkpoint": settings.checkpoint.model_copy(update={"every_steps": 1}),
        }
    )
    (problem, steps), (same, _) = run_ranks(diverge, 2, settings, corpus)
    assert problem == same
    assert problem.startswith(f"the loss of step {steps[-1]} is ")
    assert "its gradient norm nan; lower" in problem
    saved = [info.step for info in list_checkpoints(str(tmp_path / "tp2"))]
    assert saved == steps[:-1], "the step itself is reported, its weights are not kept"


SHORT_MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize(
    ("name", "numbers", "rel"),
    [
        *((name, {}, 1e-5) for name in sorted({*BUILT_IN} - {"adamw"})),
        # Another order of sums may round a moment to its other neighbour.
        ("muon", SHORT_MOMENTS, 1e-3),
    ],
)
def test_every_optimizer_goes_on_here_and_elsewhere(
    run_ranks: Run,
    tmp_path: Path,
    corpus: PreparedData,
    name: str,
    numbers: dict[str, str],
    rel: float,
) -> None:
    optimizer = OptimizerConfig.model_validate(
        {"name": name, "lr": 0.01, "weight_decay": 0.01, **numbers}
    )
    here, there = (
        config(tmp_path, *degrees).model_copy(update={"optimizer": optimizer})
        for degrees in ((1, 2), (2, 1))
    )
    goes_on_here_and_elsewhere(run_ranks, here, there, corpus, rel=rel)


def test_fp16_goes_on_here_and_elsewhere_with_its_scale(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    def in_fp16(settings: TrainConfig) -> TrainConfig:
        fields = settings.model_dump()
        fields["training"] |= {
            "precision": "fp16",
            "loss_scale": {"initial_scale": 1024, "growth_interval": 3},
        }
        return TrainConfig.from_mapping(fields)

    here, there = (in_fp16(config(tmp_path, *degrees)) for degrees in ((1, 2), (2, 1)))
    whole, half = goes_on_here_and_elsewhere(run_ranks, here, there, corpus, rel=1e-2)
    scales = [whole[step][2] for step in range(1, 9)]
    assert scales == [1024] * 3 + [2048] * 3 + [4096] * 2
    model, tokenizer = load_model(half)
    assert len(generate(model, tokenizer, "line 7: ", 24, temperature=0).tokens) > 0
    assert export_folder(half, str(tmp_path / "hf")).tensors > 0


def test_a_run_may_change_to_fp16(tmp_path: Path, corpus: PreparedData) -> None:
    settings = config(tmp_path, 1, 1)
    before = train(0, 1, settings, corpus, 1, None)
    half = list_checkpoints(str(tmp_path / "tp1"))[0].path
    commit(half, {}, [])
    fields = settings.model_dump()
    fields["training"] |= {"precision": "fp16", "loss_scale": {"initial_scale": 1024}}
    fields["checkpoint"]["resume_changes"] = ["training.precision"]
    after = train(0, 1, TrainConfig.from_mapping(fields), corpus, 2, half)
    assert [after[step][2] for step in range(5, 9)] == [1024] * 4
    for step in range(5, 9):
        assert after[step][0] == pytest.approx(before[step][0], rel=2e-3)


def test_resuming_is_exact_and_other_layouts_go_on(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    settings = config(tmp_path, 2, 2)
    whole = run_ranks(train, 4, settings, corpus, 1, None)[0]
    assert sorted(whole) == list(range(9))
    saved = [info.path for info in list_checkpoints(str(tmp_path / "tp2"))]
    assert [path.rpartition("/")[2] for path in saved] == [
        "step-00000004-a0001",
        "step-00000008-a0001",
    ]
    for path in saved:
        commit(path, {}, [])
    again = run_ranks(train, 4, settings, corpus, 2, saved[0])[0]
    assert again == {step: whole[step] for step in (0, *range(5, 9))}, "bit for bit"
    other = run_ranks(train, 2, config(tmp_path, 1, 2), corpus, 3, saved[0])[0]
    for step, values in other.items():
        assert values == pytest.approx(whole[step], rel=1e-5)
    newest = latest_committed(str(tmp_path / "tp2"))
    assert newest is not None
    assert newest.path == saved[1]
    model, tokenizer = load_model(newest.path)
    assert len(generate(model, tokenizer, "line 7: ", 24, temperature=0).tokens) > 0


def test_a_run_that_has_skipped_a_step_resumes_exactly(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    """Bias correction counts updates, and not steps."""

    def skipping(settings: TrainConfig) -> TrainConfig:
        training = settings.training.model_copy(update={"skip_steps": (2, 6)})
        return settings.model_copy(update={"training": training})

    here = skipping(config(tmp_path / "one", 1, 1))
    there = skipping(config(tmp_path / "two", 2, 1))
    goes_on_here_and_elsewhere(run_ranks, here, there, corpus, rel=2e-5)


def test_growing_batches_and_switches_are_the_same_in_every_layout(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    """Also from the middle of the ramp-up on, and where a switch follows it."""

    def growing(settings: TrainConfig) -> TrainConfig:
        fields = settings.model_dump()
        rampup = {"start": 4, "increment": 4, "samples": 60}
        fields["training"] |= {"global_batch_size": 16, "rampup_batch_size": rampup}
        fields["optimizer"] |= {
            "weight_decay": 0.1,
            "weight_decay_schedule": {"end": 0.5},
            "switches": [{"step": 7, "beta2": 0.8, "schedule": {"kind": "linear"}}],
        }
        return TrainConfig.from_mapping(fields)

    here = growing(config(tmp_path, 1, 2))
    there = growing(config(tmp_path / "one", 1, 1))
    whole, _ = goes_on_here_and_elsewhere(run_ranks, here, there, corpus, rel=1e-5)
    one = run_ranks(train, 1, there, corpus, 1, None)[0]
    piped = run_ranks(
        train, 2, growing(config(tmp_path / "pp", 1, 1, pp=2)), corpus, 1, None
    )
    for step, values in whole.items():
        assert one[step] == pytest.approx(values, rel=1e-5)
        assert piped[0][step] == pytest.approx(values, rel=2e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        {"pp": 2},
        {"pp": 2, "vpp": 2, "layout": "E|t|t|L"},
        {"pp": 2, "vpp": 2, "schedule": "zb-v", "layout": "E|t|t|L"},
        {"cp": 2, "zero": 3},
    ],
    ids=["pp2-tp2", "pp2-vpp2-tp2", "pp2-zb-v-tp2", "cp2-tp2-zero3"],
)
def test_every_layout_saves_resumes_evaluates_and_changes_places(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData, parallel: dict[str, Any]
) -> None:
    one = run_ranks(train, 1, config(tmp_path / "one", 1, 1), corpus, 1, None)[0]
    settings = config(tmp_path, 2, 1, **parallel)
    flat = config(tmp_path / "flat", 1, 2)
    piped, _ = goes_on_here_and_elsewhere(run_ranks, settings, flat, corpus, rel=2e-5)
    for step, values in piped.items():
        assert values == pytest.approx(one[step], rel=2e-5), "the evaluation too"


def in_order(folder: Path, **parallel: Any) -> TrainConfig:
    """Prepared documents without end tokens, in their order, and two kinds of validation."""
    sources = [{"path": str(folder / "long"), "weight": 3}, {"path": str(folder / "short")}]
    fields = config(folder, 1, 1).model_dump()
    fields["parallel"] = {"dp": 1, **parallel}
    fields["data"] |= {
        "train": [*sources],
        "validation": [*sources],
        "shuffle": False,
        "separate_documents": True,
    }
    fields["training"] |= {"steps": None, "epochs": 1.5, "eval_samples": 10}
    fields["training"] |= {"micro_batch_size": 1, "global_batch_size": 4}
    fields["checkpoint"]["every_steps"] = 2
    fields["storage"]["path"] = str(folder / "in_order")
    return TrainConfig.from_mapping(fields)


def losses(
    rank: int,
    world_size: int,
    settings: TrainConfig,
    data: PreparedData,
    resume: str | None,
) -> tuple[dict[int, float], EvalReport]:
    dims = ParallelDims.of(settings.parallel)
    reports: list[Report] = []
    mesh = ParallelMesh.create(dims, World(rank, world_size, rank, "cpu"))
    TrainingSession(
        settings, mesh, data, report=reports.append, attempt=2, resume_from=resume
    ).run()
    steps = [report for report in reports if isinstance(report, StepReport)]
    evaluations = [report for report in reports if isinstance(report, EvalReport)]
    return {step.step: step.loss for step in steps}, evaluations[-1]


def test_sources_borders_and_the_given_order_are_the_same_in_every_layout(
    run_ranks: Run, tmp_path: Path
) -> None:
    for name, length in (("long", 20), ("short", 7)):
        documents = [[[n, *range(60, 59 + length)]] for n in range(200 // length)]
        write_prepared(tmp_path / name, documents)
    settings = in_order(tmp_path)
    data = prepare(settings.data, str(tmp_path / "cache"), seq_length=32)
    whole, evaluation = run_ranks(losses, 1, settings, data, None)[0]
    # 396 tokens, 1.5 passes: 18 samples of 32 tokens in steps of 4.
    assert sorted(whole) == [1, 2, 3, 4]
    by_source = evaluation.source_losses
    assert list(by_source) == ["long", "short"]
    low, high = sorted(by_source.values())
    assert low < evaluation.loss < high, "the mean over the tokens of both"
    half = str(tmp_path / "in_order" / "checkpoints" / "step-00000002-a0002")
    commit(half, {}, [])
    again = run_ranks(losses, 1, settings, data, half)[0]
    assert again == ({3: whole[3], 4: whole[4]}, evaluation), "bit for bit"
    for layout in ({"dp": 2}, {"cp": 2}, {"pp": 2}):
        steps, there = run_ranks(losses, 2, in_order(tmp_path, **layout), data, None)[0]
        assert steps == pytest.approx(whole, rel=1e-4)
        assert there.loss == pytest.approx(evaluation.loss, rel=1e-4)
        assert there.source_losses == pytest.approx(by_source, rel=1e-4)
        assert there.num_tokens == evaluation.num_tokens
