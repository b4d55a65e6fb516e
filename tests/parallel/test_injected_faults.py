"""Faults of `training.inject_faults` on real ranks: the spec alone, and each is distinguished."""

from typing import Any

import pytest
import torch

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.reports import Report, RuleReport, SkippedStepReport, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.profiling.profiler import NO_PROFILER
from megatron_ray.training.progress import Progress
from megatron_ray.training.rules.checks import Recheck
from megatron_ray.training.rules.errors import RecheckError
from megatron_ray.training.rules.run import train_by_rules
from megatron_ray.training.session import batch_maker, build
from tests.support.parity import LLAMA, NoSaver, RandomDataset, make_config, make_mesh
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
BAD = 3
STRUCK = 1
"""Rank that is struck."""
NOT_FINITE = {"when": "not_finite", "action": "skip", "rerun": True}
SPIKE = {"when": "loss_spike", "limit": 100, "action": "skip", "rerun": True}
LARGE_NORM = {
    "when": "large_grad_norm",
    "samples": BAD - 1,
    "factor": 1000,
    "action": "skip",
    "rerun": True,
}
FIRST = Recheck(can_move=True)
MOVED = Recheck(can_move=True, step=BAD, rank=STRUCK)
STAYED = Recheck(can_move=True, step=BAD, rank=STRUCK, has_moved=False)
Result = dict[str, Any]


def configured(parallel: dict[str, Any], kind: str | None, **fault: Any) -> TrainConfig:
    """A run of four steps, the third of which has a fault, if any."""
    made = make_config(LLAMA, {"dp": 1} | parallel, steps=4, batch=4)
    config = made.model_dump(mode="json")
    config["training"] |= {"max_skipped_steps": 2, "rules": [NOT_FINITE, SPIKE, LARGE_NORM]}
    if kind is not None:
        injected = {"kind": kind, "steps": [BAD], "rank": STRUCK} | fault
        config["training"]["inject_faults"] = [injected]
    return TrainConfig.from_mapping(config)


def train(
    rank: int, world_size: int, config: TrainConfig, recheck: Recheck | None = None
) -> Result:
    torch.set_num_threads(1)
    mesh = make_mesh(rank, world_size, config)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32),
        *(2, 4, mesh.dp_rank, mesh.dims.dp),
        batch_maker(config, mesh),
    )
    model, optimizer = build(config, mesh)
    components = TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())
    reports: list[Report] = []
    facts: dict[str, int] = {}
    try:
        train_by_rules(
            components,
            Progress(),
            reports.append,
            lambda: Command.CONTINUE,
            NO_PROFILER,
            recheck or Recheck(),
        )
    except RecheckError as error:
        facts = error.facts
    steps = [item for item in reports if isinstance(item, StepReport)]
    verdicts = [item for item in reports if isinstance(item, RuleReport)]
    return {
        "facts": facts,
        "numbers": [(item.loss, item.grad_norm) for item in steps],
        "skipped": [item.step for item in reports if isinstance(item, SkippedStepReport)],
        "verdicts": [item.verdict for item in verdicts],
        "messages": [item.message for item in verdicts],
    }


def train_all(rank: int, world_size: int, cases: list[tuple[Any, ...]]) -> list[Result]:
    return [train(rank, world_size, *case) for case in cases]


LAYOUTS = [{"dp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"cp": 2}]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=["dp2", "tp2", "pp2", "cp2"])
@pytest.mark.parametrize("breaks", ["not_finite", "loss_spike"])
def test_the_three_kinds_are_distinguished(parallel: dict[str, Any], breaks: str) -> None:
    def faulty(kind: str) -> TrainConfig:
        return configured(parallel, kind, breaks=breaks)

    cases = [
        (configured(parallel, None),),
        (faulty("transient"), FIRST),
        (faulty("persistent"), FIRST),
        (faulty("persistent"), MOVED),
        (faulty("persistent"), STAYED),
        (faulty("correct"), FIRST),
        (faulty("correct"), MOVED),
    ]
    for results in run_ranks(train_all, 2, cases):
        plain, transient, rejected, elsewhere, stayed, correct, confirmed = results
        assert plain["verdicts"] == []
        assert transient["verdicts"] == ["rerun", "transient"]
        assert transient["numbers"] == plain["numbers"], "to the bit"
        assert rejected["verdicts"] == correct["verdicts"] == ["rerun", "recheck"]
        assert rejected["facts"] == correct["facts"] == {"step": BAD, "rank": STRUCK}
        assert rejected["numbers"] == plain["numbers"][: BAD - 1]
        assert elsewhere["verdicts"] == ["persistent"]
        assert elsewhere["numbers"] == plain["numbers"]
        assert confirmed["verdicts"] == stayed["verdicts"] == []
        assert confirmed["skipped"] == stayed["skipped"] == [BAD]


def test_a_struck_gradient_norm_leaves_the_gradients_as_they_are() -> None:
    fault = {"breaks": "large_grad_norm"}
    left_out = configured({"dp": 2}, "correct", **fault).model_dump(mode="json")
    left_out["training"]["skip_steps"] = [BAD]
    cases = [
        (configured({"dp": 2}, None),),
        (configured({"dp": 2}, "transient", **fault),),
        (configured({"dp": 2}, "correct", **fault),),
        (TrainConfig.from_mapping(left_out),),
        # Its baseline is not complete yet, so nothing would notice it.
        (configured({"dp": 2}, "correct", steps=[1], **fault),),
    ]
    for plain, transient, correct, skipped, early in run_ranks(train_all, 2, cases):
        assert transient["verdicts"] == ["rerun", "transient"]
        assert transient["numbers"] == plain["numbers"]
        assert "the gradient norm of step 3 is" in transient["messages"][0]
        assert correct["verdicts"] == ["rerun"]
        assert correct["skipped"] == skipped["skipped"] == [BAD]
        assert correct["numbers"][BAD - 1][0] == plain["numbers"][BAD - 1][0]
        assert correct["numbers"][BAD] == skipped["numbers"][BAD]
        # A step that is left out is not struck.
        assert skipped["numbers"][:BAD] == plain["numbers"][:BAD]
        assert early["numbers"] == plain["numbers"]


def test_the_struck_rank_is_named_before_the_reduction() -> None:
    config = configured({"dp": 2}, "transient", breaks="not_finite")
    fields = config.model_dump(mode="json")
    fields["training"]["rules"] = [NOT_FINITE | {"before_reduction": True}]
    for (result,) in run_ranks(train_all, 2, [(TrainConfig.from_mapping(fields),)]):
        assert "; before the reduction that was so on rank 1 " in result["messages"][0]
