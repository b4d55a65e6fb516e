"""Training in fp16: gradients that overflow are skipped on all ranks alike, with the
scale that follows; what is learnt is what fp32 learns. And gradients of bf16 and fp16
that are added up and reduced in these types.
"""

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
from megatron_ray.optimizer.loss_scale import LOSS_SCALE
from megatron_ray.optimizer.step_rates import RunRates
from megatron_ray.reports import Report, SkippedStepReport, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_reporter import NonFiniteLossError
from megatron_ray.training.session import build
from tests.support import parity
from tests.support.parity import (
    GPT2,
    LLAMA,
    NoSaver,
    assemble,
    boxes,
    make_config,
    make_mesh,
    random_loader,
    worst_relative_l2,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
EXPERTS: dict[str, Any] = LLAMA | {
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 48,
        "aux_loss_coeff": 0.5,
        "z_loss_coeff": 0.1,
    },
    "mtp": {"num_layers": 1, "loss_coeff": 0.5},
}
"""A model with every kind of loss."""
SCALE = {"initial_scale": 2.0**16, "growth_interval": 3}
BAD = (2, 5, 6)
STEPS = 10
SCALES = [2.0**16] * 5 + [2.0**15, 2.0**14, 2.0**14, 2.0**14, 2.0**15]
"""Of the first overflow nothing follows, of each further one a half; three good steps
double it.
"""
NEAR_FP32 = 2e-3
ZERO3 = {"dp": 2, "zero": 3}


class LargeTokens(StepLoader):
    """A loader in which one token of the first replica has a weight in the loss of some
    steps with which its gradients overflow fp16, or its loss is no number.
    """

    steps: tuple[int, ...] = ()
    weight = 1e6

    def step(self, consumed_samples: int) -> list[Batch]:
        (first, *rest) = super().step(consumed_samples)
        if consumed_samples // 8 + 1 in self.steps and self.dp_rank == 0:
            mask = first.loss_mask_BS.clone()
            mask[0, 0] = self.weight
            first = replace(first, loss_mask_BS=mask)
        return [first, *rest]


def fp16(
    model: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    *,
    steps: int = STEPS,
    **training: Any,
) -> TrainConfig:
    config = make_config(
        model,
        {"dp": 1, "bucket_elements": 8000} | (parallel or {}),
        steps=steps,
        precision="fp16",
    )
    fields = config.model_dump()
    fields["training"] |= {"loss_scale": SCALE} | training
    return TrainConfig.from_mapping(fields)


Result = dict[str, Any]


def run(
    rank: int,
    world_size: int,
    config: TrainConfig,
    bad: tuple[int, ...] = (),
    weight: float = LargeTokens.weight,
) -> Result:
    torch.set_num_threads(1)
    mesh = make_mesh(rank, world_size, config)
    loader = random_loader(config, mesh, LargeTokens)
    loader.steps = bad
    loader.weight = weight
    model, optimizer = build(config, mesh)
    reports: list[Report] = []
    states: list[Any] = []

    def poll() -> Command:
        state = {
            name: entry
            for name, entry in optimizer.sharded_state().items()
            if name != LOSS_SCALE
        }
        states.append(boxes(state))
        return Command.CONTINUE

    parts = TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())
    error = ""
    try:
        train(parts, Progress(), reports.append, poll)
    except NonFiniteLossError as problem:
        error = str(problem)
    poll()
    return {
        "error": error,
        "states": states,
        "steps": [report for report in reports if isinstance(report, StepReport)],
        "skipped": [report for report in reports if isinstance(report, SkippedStepReport)],
    }


def run_all(
    rank: int, world_size: int, cases: list[tuple[TrainConfig, tuple[int, ...]]]
) -> list[Result]:
    return [run(rank, world_size, config, bad) for config, bad in cases]


@cache
def one_rank(experts: bool) -> Result:
    return run(0, 1, fp16(EXPERTS if experts else LLAMA), BAD)


def column(result: Result, name: str) -> list[float]:
    return [getattr(report, name) for report in result["steps"]]


def check_skips(result: Result) -> None:
    """Skipped are the bad steps, and no others, and the scale follows."""
    assert result["error"] == ""
    assert column(result, "loss_scale") == SCALES
    assert [report.step for report in result["skipped"]] == list(BAD)
    assert column(result, "skipped_steps") == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3]
    for step in range(1, STEPS + 1):
        before, after = result["states"][step - 1 : step + 1]
        is_same = all(
            np.array_equal(old[2], new[2]) for old, new in zip(before, after, strict=True)
        )
        assert is_same == (step in BAD), step


@pytest.mark.parametrize("experts", [False, True])
def test_an_overflow_skips_exactly_its_step(experts: bool) -> None:
    config = fp16(LLAMA)
    result = one_rank(experts)
    check_skips(result)
    # A skipped step counts, so the rate is that of the schedule.
    rates = RunRates(config)
    assert column(result, "lr") == [rates.at(step).lr for step in range(1, STEPS + 1)]
    message = "step 5 skipped, weights unchanged: its gradients overflow fp16 at a loss "
    assert result["skipped"][1].message == message + "scale of 65536"
    assert np.isfinite(column(result, "loss")).all()


LAYOUTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "tp2-sp": (False, {"tp": 2, "sequence_parallel": True}),
    "pp2": (False, {"pp": 2}),
    "pp2-zb-v": (False, {"pp": 2, "vpp": 2, "schedule": "zb-v", "layout": "E|t|t|L"}),
    "dp2-zero1": (False, {"dp": 2}),
    "dp2-zero3": (False, {"dp": 2, "zero": 3}),
    "cp2": (False, {"cp": 2}),
    "ep2": (True, {"dp": 2, "ep": 2}),
}


def test_all_ranks_of_every_layout_skip_the_same_steps() -> None:
    cases = [
        (fp16(EXPERTS if experts else LLAMA, parallel), BAD)
        for experts, parallel in LAYOUTS.values()
    ]
    for results in run_ranks(run_all, 2, cases):
        for result, (name, (experts, _)) in zip(results, LAYOUTS.items(), strict=True):
            check_skips(result)
            one = one_rank(experts)
            # That of a bad step counts more bad tokens with cp, one on each rank.
            losses, expected = (
                np.delete(column(each, "loss"), [step - 1 for step in BAD])
                for each in (result, one)
            )
            np.testing.assert_allclose(losses, expected, rtol=2e-3, err_msg=name)


def gradients(
    rank: int, world_size: int, configs: list[TrainConfig]
) -> list[list[tuple[str, tuple[int, ...], np.ndarray]]]:
    return [parity.run_layout(rank, world_size, config).gradients for config in configs]


BF16: dict[str, Any] = {"precision": "bf16", "loss_scale": None}
SHORT: dict[str, Any] = {"grad_reduce_in_fp32": False}
WIDE: dict[str, Any] = {"fp32_residual_connection": True}
RECOMPUTE: dict[str, Any] = {
    "recompute": {"granularity": "full", "method": "uniform", "num_layers": 1}
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "llama": (LLAMA, {}, 0.002),
    "gpt2": (GPT2, {}, 0.002),
    "short-gradients": (LLAMA, SHORT, 0.002),
    "bf16-short-gradients": (LLAMA, BF16 | SHORT, 0.02),
    "bf16-wide-recomputed": (GPT2, BF16 | WIDE | RECOMPUTE, 0.02),
}
"""Model, fields of training, and the largest distance of one rank's gradients from those
in float64."""


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_stay_as_close_to_float64_as_one_rank(kind: str) -> None:
    model, training, allowed = KINDS[kind]
    layouts = [{"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"dp": 2}, ZERO3]
    config = fp16(model, {}, steps=1, **training)
    truth = parity.float64_gradients(0, 1, config)

    def distance(ranks: list[Any], config: TrainConfig) -> float:
        measured = assemble(config, ranks)
        squared = sum(
            float(np.square(measured[name] - tensor).sum())
            for name, tensor in truth.items()
        )
        return squared / sum(float(np.square(tensor).sum()) for tensor in truth.values())

    of_one = distance(gradients(0, 1, [config]), config)
    assert of_one < allowed**2
    configs = [fp16(model, layout, steps=1, **training) for layout in layouts]
    by_rank = run_ranks(gradients, 2, configs)
    for number, layout in enumerate(configs):
        ranks = [results[number] for results in by_rank]
        assert distance(ranks, layout) <= 1.3**2 * of_one, layouts[number]


@pytest.mark.parametrize("scale", [2.0**8, 3000.0])
def test_all_losses_are_scaled_and_their_gradients_are_unscaled(scale: float) -> None:
    exact = make_config(EXPERTS, {"dp": 1}, steps=1)
    whole = parity.run_layout(0, 1, exact)
    # The same choices, since experts with nearly equal logits are chosen otherwise.
    choices = parity.record_choices(exact, whole)
    config = fp16(EXPERTS, steps=1, loss_scale={"constant": scale})
    scaled = parity.run_layout(0, 1, config, choices=choices)
    distance = worst_relative_l2(
        assemble(config, [scaled.gradients]), assemble(exact, [whole.gradients])
    )
    assert distance[0] < 0.02, distance
    np.testing.assert_allclose(scaled.grad_norms, whole.grad_norms, rtol=1e-2)
    np.testing.assert_allclose(scaled.other_losses, whole.other_losses, rtol=1e-2)


def test_wide_residuals_are_closer_to_float64() -> None:
    deep = LLAMA | {"num_layers": 12}
    truth = parity.float64_gradients(0, 1, fp16(deep, steps=1))
    distances = []
    narrow: dict[str, Any] = {}
    for fields in (narrow, WIDE):
        config = fp16(deep, steps=1, **BF16, **fields)
        (measured,) = gradients(0, 1, [config])
        distances.append(worst_relative_l2(assemble(config, [measured]), truth)[0])
    assert distances[1] < 0.8 * distances[0], distances


def test_fp16_learns_what_fp32_learns() -> None:
    config = make_config(LLAMA, {"dp": 1}, steps=STEPS)
    expected = parity.run_layout(0, 1, config)
    measured = run(0, 1, fp16(LLAMA))
    np.testing.assert_allclose(column(measured, "loss"), expected.losses, rtol=NEAR_FP32)
    assert expected.losses[-1] < expected.losses[0] - 0.1


ENDS: list[tuple[dict[str, Any], tuple[int, ...], float, int, str]] = [
    (
        {"loss_scale": {"initial_scale": 2.0**16, "min_scale": 2.0**15}},
        (2, 3, 4),
        1e6,
        4,
        "at a loss scale of 32768; use training.precision=bf16, which has the range of fp32, "
        "lower optimizer.lr",
    ),
    ({}, (3,), np.inf, 3, "at a loss scale of 65536; use training.precision=bf16"),
    (
        {"loss_scale": {"constant": 2.0**16}},
        (2,),
        1e6,
        2,
        "or a smaller training.loss_scale.constant, lower optimizer.lr",
    ),
]
"""Fields of training, bad steps, a token's weight in these, the last step, and words of
the error."""


@pytest.mark.parametrize(("fields", "bad", "weight", "last", "words"), ENDS)
def test_what_no_lower_scale_cures_ends_the_run(
    fields: dict[str, Any], bad: tuple[int, ...], weight: float, last: int, words: str
) -> None:
    result = run(0, 1, fp16(LLAMA, **fields), bad, weight)
    assert len(result["steps"]) == last
    assert result["error"].startswith(f"the loss of step {last} is ")
    assert words in result["error"]


def test_a_step_that_is_left_out_leaves_the_scale_as_it_is() -> None:
    result = run(0, 1, fp16(LLAMA, steps=5, skip_steps=(2,)), (2, 3))
    assert column(result, "loss_scale") == [2.0**16] * 5
    assert column(result, "skipped_steps") == [0, 0, 1, 1, 1]
