"""Steps whose gradients are no numbers are skipped on all ranks alike, within limits."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.models.batch import Batch
from megatron_ray.reports import Report, SkippedStepReport, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_reporter import NonFiniteLossError
from megatron_ray.training.session import build
from tests.support.parity import (
    LLAMA,
    NoSaver,
    assemble,
    boxes,
    make_config,
    make_mesh,
    random_loader,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
BAD = 3
MOE: dict[str, Any] = LLAMA | {
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 48,
        "score_function": "sigmoid",
        "expert_bias": True,
    }
}


class BadSteps(StepLoader):
    """A loader in which one token of the first replica has an infinite weight in the
    loss of some steps.
    """

    steps: tuple[int, ...] = ()

    def step(self, consumed_samples: int) -> list[Batch]:
        (first, *rest) = super().step(consumed_samples)
        if consumed_samples // 8 + 1 in self.steps and self.dp_rank == 0:
            mask = first.loss_mask_BS.clone()
            mask[0, 0] = torch.inf
            first = replace(first, loss_mask_BS=mask)
        return [first, *rest]


class Saved(NoSaver):
    """Keeps the progress of every checkpoint."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []

    def save(self, progress: Progress) -> None:
        self.progress.append(progress)


Result = dict[str, Any]


def run_with_bad_steps(
    rank: int, world_size: int, config: TrainConfig, bad: tuple[int, ...] = (BAD,)
) -> Result:
    torch.set_num_threads(1)
    mesh = make_mesh(rank, world_size, config)
    loader = random_loader(config, mesh, BadSteps)
    loader.steps = bad
    model, optimizer = build(config, mesh)
    reports: list[Report] = []
    states: list[Any] = []

    def poll() -> Command:
        biases = [bias.value.clone().numpy() for bias in model.expert_biases.values()]
        states.append((boxes(optimizer.sharded_state()), biases))
        return Command.CONTINUE

    saver = Saved()
    parts = TrainingComponents(config, mesh, model, optimizer, loader, None, saver)
    error = ""
    try:
        train(parts, Progress(), reports.append, poll)
    except NonFiniteLossError as problem:
        error = str(problem)
    poll()
    return {
        "error": error,
        "states": states,
        "saved": saver.progress,
        "steps": [report for report in reports if isinstance(report, StepReport)],
        "skipped": [report for report in reports if isinstance(report, SkippedStepReport)],
    }


def skipping(parallel: dict[str, Any], model: Any = LLAMA, **training: Any) -> TrainConfig:
    config = make_config(model, {"dp": 1, "bucket_elements": 8000} | parallel, steps=5)
    training = {"max_skipped_steps": 1} | training
    return config.model_copy(
        update={"training": config.training.model_copy(update=training)}
    )


@cache
def one_rank(model: str) -> Result:
    config = skipping({}, MOE if model == "moe" else LLAMA)
    results: list[Result] = run_ranks(run_with_bad_steps, 1, config)
    return results[0]


@pytest.mark.parametrize(
    ("parallel", "world", "model"),
    [
        ({"tp": 2, "sequence_parallel": True}, 2, "llama"),
        ({"pp": 2}, 2, "llama"),
        ({"dp": 2, "zero": 3}, 2, "llama"),
        ({"dp": 2, "ep": 2}, 2, "moe"),
    ],
    ids=["tp2-sp", "pp2", "dp2-zero3", "moe-ep2-zero1"],
)
def test_a_bad_step_changes_nothing_on_any_rank(
    parallel: dict[str, Any], world: int, model: str
) -> None:
    config = skipping(parallel, MOE if model == "moe" else LLAMA)
    ranks: list[Result] = run_ranks(run_with_bad_steps, world, config)
    for result in [*ranks, one_rank(model)]:
        before, after = result["states"][BAD - 1 : BAD + 1]
        assert same(before, after), "weights, moments and biases of experts"
        assert not same(after, result["states"][BAD + 1])
        assert [report.step for report in result["skipped"]] == [BAD]
        assert not np.isfinite(result["steps"][BAD - 1].loss)
        assert result["skipped"][0].message.startswith(
            f"step {BAD} skipped, weights unchanged: its loss is "
        )
        counts = [report.skipped_steps for report in result["steps"]]
        assert counts == [0, 0, 1, 1, 1]
        assert result["saved"][-1].num_updates == 4
    losses = [report.loss for report in one_rank(model)["steps"]]
    for result in ranks:
        rank_losses = [report.loss for report in result["steps"]]
        np.testing.assert_allclose(rank_losses, losses, rtol=1e-5)
    final, expected = (
        assemble(config, [weights(result) for result in results])
        for results in (ranks, [one_rank(model)])
    )
    for name, values in expected.items():
        assert np.abs(values - final[name]).max() <= 1e-5, name


def same(state: Any, other: Any) -> bool:
    values = [*(values for _, _, values in state[0]), *state[1]]
    others = [*(values for _, _, values in other[0]), *other[1]]
    return all(np.array_equal(a, b) for a, b in zip(values, others, strict=True))


def weights(result: Result) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    return [
        (name.removeprefix("model/"), offset, values)
        for name, offset, values in result["states"][-1][0]
        if name.startswith("model/")
    ]


def run_all(
    rank: int, world_size: int, cases: list[tuple[TrainConfig, tuple[int, ...]]]
) -> list[Result]:
    return [run_with_bad_steps(rank, world_size, config, bad) for config, bad in cases]


def test_a_step_that_is_left_out_leaves_the_run_that_never_saw_its_numbers() -> None:
    config = skipping({}, max_skipped_steps=0, skip_steps=(BAD,))
    (results,) = run_ranks(run_all, 1, [(config, (BAD,)), (config, ())])
    for result in results:
        assert result["error"] == ""
        assert same(result["states"][-1], one_rank("llama")["states"][-1]), "to the bit"
        assert [report.step for report in result["skipped"]] == [BAD]
        assert [report.skipped_steps for report in result["steps"]] == [0] * 5


LIMITS: list[tuple[dict[str, Any], tuple[int, ...], int, str]] = [
    ({"max_skipped_steps": 0}, (2,), 2, "gradient norm nan; lower optimizer.lr"),
    ({}, (2, 4), 4, "after the 1 skipped steps of training.max_skipped_steps"),
    (
        {"max_skipped_steps": 5, "max_consecutive_skipped_steps": 1},
        (1, 3, 4),
        4,
        "after 1 skipped steps in a row",
    ),
]
"""Fields of training, bad steps, the last step, and words of the error."""


def test_one_bad_step_more_than_allowed_ends_the_run_on_every_rank() -> None:
    cases = [(skipping({"dp": 2}, **training), bad) for training, bad, _, _ in LIMITS]
    for results in run_ranks(run_all, 2, cases):
        for result, (_, _, last, words) in zip(results, LIMITS, strict=True):
            assert result["error"].startswith(f"the loss of step {last} is ")
            assert words in result["error"]
            assert f"training.skip_steps=[{last}]" in result["error"]
            steps = [report.step for report in result["steps"]]
            assert steps == list(range(1, last + 1))
            assert result["saved"] == []
