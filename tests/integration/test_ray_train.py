"""Ray Train restarts a run, and does not repeat an error that would come again.

That its losses are those of a job is in stack/test_road.py.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.standalone_job import PLAIN, losses, run, write_job
from workers.job_file import parse_spec
from workers.rank.messages import UserError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.chaos,
    # Parts of Ray that Ray Train imports use settings of others that are deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LONG = (*PLAIN, "training.steps=300", "checkpoint.every_steps=20")


def kill_at_a_commit(job: Path) -> None:
    """Kills rank 0 once a checkpoint is committed."""
    folder = job.parent / "runs" / "job"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(folder.glob("checkpoints/*/COMMITTED")):
            claim = json.loads((folder / "run.json").read_text())
            os.kill(claim["pid"], signal.SIGKILL)
            return
        time.sleep(0.01)


def test_a_rank_that_dies_costs_the_steps_since_the_newest_checkpoint(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.ray_train import RayTrainOptions, train

    monkeypatch.chdir(tmp_path)
    job = write_job(tmp_path)
    run(job, *LONG, f"storage.path={tmp_path}/elsewhere", reports=tmp_path / "whole.jsonl")
    killer = threading.Thread(target=kill_at_a_commit, args=[job], daemon=True)
    killer.start()
    overrides = (*LONG, "parallel.dp=1", "restart.max_failures=1")
    reports = tmp_path / "train.jsonl"
    ending = train(parse_spec(job, overrides), RayTrainOptions(reports=reports))
    killer.join()
    assert ending.exit_code == 0
    assert ending.message is not None
    assert ending.message.endswith("step-00000300-a0002")
    assert losses(reports) == losses(tmp_path / "whole.jsonl"), "bit for bit"
    attempts = set()
    for line in reports.read_text().splitlines():
        attempts.add(json.loads(line)["attempt"])
    assert attempts == {1, 2}


def test_an_error_of_the_user_is_one_message_and_not_tried_again(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.ray_train import train

    monkeypatch.chdir(tmp_path)
    job = write_job(tmp_path)
    overrides = (*PLAIN, "parallel.dp=1", "data.train=[{path: /nowhere}]")
    with pytest.raises(UserError) as caught:
        train(parse_spec(job, overrides))
    message = "the job cannot start:\n  /data/train/0/path: /nowhere does not exist"
    assert str(caught.value).startswith(message)
