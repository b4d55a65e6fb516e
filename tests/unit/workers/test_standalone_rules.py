"""Rules with actions in a job without Ray, in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ray.checkpoint.directory import list_checkpoints, rollbacks_of
from megatron_ray.data.loader import StepLoader
from megatron_ray.exceptions import ErrorKind
from megatron_ray.training import session
from tests.support.faulty_steps import FaultySteps
from tests.support.standalone_job import PLAIN, losses, run, write_job
from workers.standalone import EXIT_FAILED, TrainingFailedError

BAD = 7
SPIKE = {"when": "loss_spike", "limit": 100}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_job(tmp_path)


@pytest.fixture
def bad_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of one step are bad on every rank."""

    class Loader(FaultySteps):
        steps = (BAD,)
        batch = 2

    monkeypatch.setattr(session, "StepLoader", Loader)


def options(*rules: dict[str, Any], steps: int = 9) -> list[str]:
    listed = yaml.safe_dump(list(rules), default_flow_style=True, width=1000).strip()
    return [
        *PLAIN,
        f"training.rules={listed}",
        f"training.steps={steps}",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=2",
    ]


def verdicts(reports: Path) -> list[tuple[int, str]]:
    rows = []
    for line in reports.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "training_rule":
            rows.append((record["data"]["step"], record["data"]["verdict"]))
    return rows


def expected_losses(folder: Path, left_out: list[int]) -> dict[int, float]:
    """Those of a run whose steps are left out from its start on, with good samples."""
    folder.mkdir()
    job = write_job(folder)
    reports = folder / "reports.jsonl"
    overrides = [f"training.skip_steps={left_out}", *options()[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "StepLoader", StepLoader)
        patch.chdir(folder)
        run(job, *overrides, reports=reports)
    return losses(reports)


@pytest.mark.usefixtures("bad_samples")
def test_a_rollback_leaves_the_run_that_never_saw_the_samples(job: Path) -> None:
    reports = job.parent / "reports.jsonl"
    notices: list[str] = []
    rule = SPIKE | {"action": "rollback", "back_steps": 2}
    message = run(job, *options(rule), reports=reports, notify=notices.append)
    assert message.startswith("finished; newest checkpoint: ")
    assert verdicts(reports) == [(BAD, "rollback")]
    # Checkpoints of steps 4 and 6 were kept, and 6 is less than two steps back.
    assert "the run goes on from step 4" in notices
    assert notices[0].startswith("warning: the loss of step 7 is "), notices
    assert notices[0].endswith(
        "above the limit of 100 (training.rules[0]); the run goes back to step 5 or before "
        "and leaves out the samples of step 7"
    )
    own = losses(reports)
    expected = expected_losses(job.parent / "other", [BAD])
    del own[BAD], expected[BAD]
    assert own == expected, "to the bit"
    root = str(job.parent / "runs" / "job")
    (rollback,) = rollbacks_of(root)
    assert (rollback.attempt, list(rollback.left_out)) == (1, [BAD])
    kept = [(info.step, info.attempt) for info in list_checkpoints(root)]
    # That of step 6 in the first attempt is left behind, and neither counted nor deleted.
    assert kept == [(6, 1), (8, 2), (9, 2)]


@pytest.mark.usefixtures("bad_samples")
def test_a_later_resume_leaves_the_samples_out_too(job: Path) -> None:
    reports = job.parent / "reports.jsonl"
    rule = SPIKE | {"action": "rollback", "back_steps": 2}
    message = run(job, *options(rule), "training.exit_every_steps=5", reports=reports)
    assert "ended after step 5" in message
    # The second part is rolled back to step 5, where the first one ended.
    message = run(
        job, *options(rule), "training.exit_every_steps=6", resume=True, reports=reports
    )
    assert "ended after step 6" in message
    message = run(job, *options(rule, steps=9), resume=True, reports=reports)
    assert "finished" in message
    assert verdicts(reports) == [(BAD, "rollback")]
    own = losses(reports)
    expected = expected_losses(job.parent / "other", [BAD])
    del own[BAD], expected[BAD]
    assert own == expected


@pytest.mark.usefixtures("bad_samples")
def test_a_run_without_a_checkpoint_goes_back_to_its_beginning(job: Path) -> None:
    reports = job.parent / "reports.jsonl"
    rule = SPIKE | {"action": "rollback", "leave_out": 2}
    overrides = [*options(rule), "checkpoint.every_steps=null"]
    run(job, *overrides, reports=reports)
    own = losses(reports)
    expected = expected_losses(job.parent / "other", [BAD - 1, BAD])
    del own[BAD], expected[BAD]
    assert own == expected


REFUSALS = [
    (
        {"back_steps": 6},
        [],
        "no checkpoint is of step 1 or before, the oldest is of step 4",
    ),
    ({}, ["training.max_rollbacks=1"], "after the 1 rollbacks of training.max_rollbacks"),
]


@pytest.mark.parametrize(("fields", "more", "words"), REFUSALS)
def test_a_rollback_that_is_refused_ends_the_run(
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    more: list[str],
    words: str,
) -> None:
    class Loader(FaultySteps):
        steps = (BAD, BAD + 1)
        batch = 2

    monkeypatch.setattr(session, "StepLoader", Loader)
    rule = SPIKE | {"action": "rollback"} | fields
    with pytest.raises(TrainingFailedError, match=words) as error:
        run(job, *options(rule), *more)
    assert (error.value.exit_code, error.value.kind) == (EXIT_FAILED, ErrorKind.RULE)


@pytest.mark.usefixtures("bad_samples")
def test_a_stop_saves_the_last_good_state(job: Path) -> None:
    reports = job.parent / "reports.jsonl"
    rule = SPIKE | {"action": "stop"}
    overrides = options(rule)
    overrides[-2] = "checkpoint.every_steps=4"
    with pytest.raises(TrainingFailedError) as error:
        run(job, *overrides, reports=reports)
    text = str(error.value)
    assert (
        "above the limit of 100 (training.rules[0]); the weights are those of step 6"
        in text
    )
    assert text.endswith("checkpoints/step-00000006-a0001")
    # As the message advises.
    overrides[0] = f"training.skip_steps=[{BAD}]"
    run(job, *overrides, resume=True, reports=reports)
    own = losses(reports)
    expected = expected_losses(job.parent / "other", [BAD])
    del own[BAD], expected[BAD]
    assert own == expected


@pytest.mark.usefixtures("bad_samples")
def test_one_step_back_costs_no_step(job: Path) -> None:
    reports = job.parent / "reports.jsonl"
    notices: list[str] = []
    run(
        job,
        *options(SPIKE | {"action": "rollback"}),
        reports=reports,
        notify=notices.append,
    )
    assert "the run goes on from step 6" in notices
    own = losses(reports)
    expected = expected_losses(job.parent / "other", [BAD])
    del own[BAD], expected[BAD]
    assert own == expected


def test_a_rehearsed_fault_strikes_again_after_a_resume(job: Path) -> None:
    fault = "{kind: transient, breaks: loss_spike, steps: [3, 7]}"
    rehearsal = [*options(SPIKE | {"action": "stop", "rerun": True})]
    rehearsal.append(f"training.inject_faults=[{fault}]")
    reports = job.parent / "reports.jsonl"
    notices: list[str] = []
    first = [*rehearsal, "training.exit_every_steps=6"]
    run(job, *first, reports=reports, notify=notices.append)
    assert notices[0].startswith("warning: /training/inject_faults: the run is a rehearsal")
    run(job, *rehearsal, resume=True, reports=reports)
    struck = [(3, "rerun"), (3, "transient"), (7, "rerun"), (7, "transient")]
    assert verdicts(reports) == struck
    assert losses(reports) == expected_losses(job.parent / "other", []), "to the bit"


def test_a_new_run_in_the_folder_leaves_nothing_out(job: Path) -> None:
    folder = job.parent / "runs" / "job" / "checkpoints"
    folder.mkdir(parents=True)
    rollback = {"attempt": 3, "step": 2, "leave_out": 1, "max_step": 1, "message": ""}
    (folder / "rollbacks.json").write_text(json.dumps({"rollbacks": [rollback]}))
    reports = job.parent / "reports.jsonl"
    run(job, *options(steps=2), reports=reports)
    assert '"kind":"skipped_step"' not in reports.read_text()
