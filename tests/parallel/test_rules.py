"""Rules and comparisons of replicas on real ranks: all of them conclude the same."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.reports import Report, RuleReport, SkippedStepReport, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.profiling.profiler import NO_PROFILER
from megatron_ray.training.progress import Progress
from megatron_ray.training.rules.checks import Recheck
from megatron_ray.training.rules.errors import RecheckError
from megatron_ray.training.rules.replicas import ReplicaError
from megatron_ray.training.rules.run import train_by_rules
from megatron_ray.training.session import batch_maker, build
from tests.support.faulty_steps import Fault, FaultySteps
from tests.support.parity import LLAMA, NoSaver, RandomDataset, make_config, make_mesh
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
BAD = 3
SPIKE = {"when": "loss_spike", "limit": 100}
Result = dict[str, Any]


def configured(parallel: dict[str, Any], **training: Any) -> TrainConfig:
    config = make_config(LLAMA, {"dp": 1} | parallel, steps=4).model_dump(mode="json")
    config["training"] |= {"max_skipped_steps": 2} | training
    return TrainConfig.from_mapping(config)


def train(
    rank: int,
    world_size: int,
    config: TrainConfig,
    fault: Fault,
    recheck: Recheck | None = None,
    flip_after: int | None = None,
    weight: float = 1e6,
    struck_replica: int = 0,
) -> Result:
    """Trains with a fault of one replica; flips a bit on rank 1 before a step."""
    torch.set_num_threads(1)
    mesh = make_mesh(rank, world_size, config)
    loader = FaultySteps(
        RandomDataset(config.model.vocabulary, 32),
        *(2, 8, mesh.dp_rank, mesh.dims.dp),
        batch_maker(config, mesh),
    )
    loader.steps = (BAD,)
    loader.fault = fault
    loader.weight = weight
    loader.struck_replica = struck_replica
    loader.is_faulty_device = recheck is None or recheck.step is None
    model, optimizer = build(config, mesh)
    reports: list[Report] = []

    def report(item: Report) -> None:
        reports.append(item)
        if isinstance(item, StepReport) and item.step == flip_after and rank == 1:
            flat = model.parameter_groups[0].buffers.parameters
            flat.view(torch.int32)[0] ^= 1

    components = TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())
    error = ""
    facts: dict[str, int] = {}
    try:
        train_by_rules(
            components,
            Progress(),
            report,
            lambda: Command.CONTINUE,
            NO_PROFILER,
            recheck or Recheck(),
        )
    except RecheckError as raised:
        facts = raised.facts
    except ReplicaError as raised:
        error = f"{raised.failure_kind}: {raised}"
    return {
        "error": error,
        "facts": facts,
        "losses": [item.loss for item in reports if isinstance(item, StepReport)],
        "skipped": [item.step for item in reports if isinstance(item, SkippedStepReport)],
        "verdicts": [item.verdict for item in reports if isinstance(item, RuleReport)],
        "messages": [item.message for item in reports if isinstance(item, RuleReport)],
        "suspects": [item.suspect for item in reports if isinstance(item, RuleReport)],
    }


def train_all(rank: int, world_size: int, cases: list[tuple[Any, ...]]) -> list[Result]:
    return [train(rank, world_size, *case) for case in cases]


@pytest.mark.parametrize(
    "parallel", [{"dp": 2}, {"tp": 2, "sequence_parallel": True}], ids=["dp2", "tp2"]
)
def test_skip_acts_on_exactly_its_step_on_all_ranks(parallel: dict[str, Any]) -> None:
    rules = [SPIKE | {"action": "skip"}]
    cases = [
        (configured(parallel, rules=rules), Fault.OF_THE_DATA),
        (configured(parallel, skip_steps=[BAD]), Fault.OF_THE_DATA),
    ]
    for skipped, left_out in run_ranks(train_all, 2, cases):
        assert skipped["skipped"] == [BAD]
        assert skipped["losses"][BAD - 1] > 100
        assert skipped["losses"] == left_out["losses"], "to the bit"


NOT_FINITE = {"when": "not_finite", "action": "skip", "rerun": True}


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        ({"dp": 2}, "rank 1"),
        ({"dp": 2, "zero": 0, "bucket_elements": 8000}, "rank 1"),
        ({"tp": 2, "sequence_parallel": True}, "ranks 0, 1"),
    ],
    ids=["zero1", "zero0", "tp2"],
)
def test_ranks_with_own_numbers_that_are_not_finite_are_named(
    parallel: dict[str, Any], named: str
) -> None:
    checked = configured(parallel, rules=[NOT_FINITE | {"before_reduction": True}])
    unchecked = configured(parallel, rules=[NOT_FINITE])
    replica = 1 if "dp" in parallel else 0
    struck = (None, float("inf"), replica)
    cases = [
        (checked, Fault.TRANSIENT, None, *struck),
        (unchecked, Fault.TRANSIENT, None, *struck),
        (checked, Fault.PERSISTENT, Recheck(can_move=True), *struck),
    ]
    for transient, plain, persistent in run_ranks(train_all, 2, cases):
        assert transient["losses"] == plain["losses"], "to the bit"
        assert len(transient["losses"]) == 4
        assert transient["verdicts"] == ["rerun", "transient"]
        sentence = f"; before the reduction that was so on {named} (training.rules[0])"
        assert sentence in transient["messages"][0]
        assert "before the reduction" not in plain["messages"][0]
        assert persistent["verdicts"] == ["rerun", "recheck"]
        assert persistent["suspects"] == [None, replica]
        assert persistent["facts"] == {"step": BAD, "rank": replica}


def test_transient_and_persistent_faults_are_distinguished_on_two_ranks() -> None:
    rules = [SPIKE | {"action": "skip", "rerun": True}]
    config = configured({"dp": 2}, rules=rules)
    moved = Recheck(can_move=True, step=BAD, rank=0)
    cases = [
        (config, Fault.TRANSIENT),
        (config, Fault.PERSISTENT, Recheck(can_move=True)),
        (config, Fault.PERSISTENT, moved),
        (config, Fault.OF_THE_DATA, moved),
    ]
    for transient, rejected, elsewhere, of_the_data in run_ranks(train_all, 2, cases):
        assert transient["verdicts"] == ["rerun", "transient"]
        assert rejected["verdicts"] == ["rerun", "recheck"]
        assert rejected["facts"] == {"step": BAD, "rank": 0}
        assert elsewhere["verdicts"] == ["persistent"]
        assert elsewhere["losses"] == transient["losses"], "those of a run without a fault"
        assert np.max(elsewhere["losses"]) < 100
        assert of_the_data["verdicts"] == []
        assert of_the_data["skipped"] == [BAD]


def test_a_flipped_bit_is_found_and_named() -> None:
    fields = {"check_replicas_every_steps": 2, "rules": [SPIKE | {"action": "skip"}]}
    config = configured({"dp": 2}, **fields)
    # Weights that are still on their way are waited for.
    overlapped = configured({"dp": 2, "overlap_param_gather": True}, **fields)
    cases = [
        (config, Fault.TRANSIENT),
        (overlapped, Fault.TRANSIENT),
        (config, Fault.TRANSIENT, None, 2),
    ]
    for whole, same, flipped in run_ranks(train_all, 2, cases):
        assert whole["error"] == same["error"] == ""
        assert flipped["error"] == (
            "replicas: after step 2 the replicas on ranks 0, 1 have different weights in "
            "head.weight, and which of them is right is not known; the run goes on from "
            "a checkpoint"
        )
        assert len(flipped["losses"]) == 2
