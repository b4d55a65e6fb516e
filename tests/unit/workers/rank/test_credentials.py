"""Credentials that a spec names: files of mounted secrets, in the environment while needed."""

import os
from pathlib import Path
from typing import Any

import pytest

from workers.agent.check_tasks import check_task
from workers.data_tasks import prepare_task
from workers.rank.environment import (
    CREDENTIALS_DIR,
    CredentialsError,
    credentials,
    export_credentials,
)

KEY = "AWS_ACCESS_KEY_ID"
SECRET = "AWS_SECRET_ACCESS_KEY"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's folder of secrets: two for stores of S3's kind, one for Google's."""
    for name in ("corpora", "weights"):
        (tmp_path / name).mkdir()
        (tmp_path / name / KEY).write_text(f"key of {name}\n")
        (tmp_path / name / SECRET).write_text("s3cr3t")
        (tmp_path / name / "PATH").write_text("/evil")
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "GOOGLE_APPLICATION_CREDENTIALS").write_text("{}")
    monkeypatch.setenv(CREDENTIALS_DIR, str(tmp_path))
    monkeypatch.setenv(KEY, "the cluster's")
    monkeypatch.delenv(SECRET, raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    return tmp_path


def test_credentials_are_in_the_environment_while_they_are_needed(root: Path) -> None:
    path = os.environ["PATH"]
    with credentials(("corpora", "google")):
        assert (os.environ[KEY], os.environ[SECRET]) == ("key of corpora", "s3cr3t")
        named = root / "google" / "GOOGLE_APPLICATION_CREDENTIALS"
        assert os.environ["GOOGLE_APPLICATION_CREDENTIALS"] == str(named)
        # Files of other names are no variables.
        assert os.environ["PATH"] == path
    assert os.environ[KEY] == "the cluster's"
    assert SECRET not in os.environ
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ


def test_a_rank_keeps_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "")
    export_credentials(("weights",))
    assert (os.environ[KEY], os.environ[SECRET]) == ("key of weights", "s3cr3t")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["moon"], "/credentials/0: credentials 'moon' are not mounted on node "),
        (["corpora", "weights"], "both hold AWS_ACCESS_KEY_ID; name one of them"),
        (["../corpora"], "/credentials/0: '../corpora' is not the name of a secret"),
        ([".."], "/credentials/0: '..' is not the name of a secret"),
    ],
)
def test_what_cannot_be_used_is_named_without_a_secret(
    root: Path, names: list[str], message: str
) -> None:
    with pytest.raises(CredentialsError) as error:
        export_credentials(names)
    assert message in str(error.value)
    assert "s3cr3t" not in str(error.value)
    assert os.environ[KEY] == "the cluster's"


def test_tasks_of_a_job_use_its_credentials_and_no_others(root: Path) -> None:
    spec: dict[str, Any] = {
        "model": {"preset": "gpt-tiny"},
        "data": {"train": [{"path": str(root / "nothing.txt")}]},
        "training": {"seq_length": 8, "global_batch_size": 1, "steps": 1},
        "optimizer": {"lr": 0.1},
        "storage": {"path": str(root / "job")},
        "credentials": ["moon"],
    }
    (checked,) = check_task(spec, str(root / "job"))["problems"]
    (prepared,) = prepare_task(spec)["problems"]
    assert checked == prepared
    assert (checked["pointer"], checked["code"]) == ("/credentials/0", "credentials")
    assert checked["detail"].startswith("credentials 'moon' are not mounted on node ")
    spec["credentials"] = ["corpora"]
    (checked,) = check_task(spec, str(root / "job"))["problems"]
    assert checked["pointer"] == "/data/train/0/path"
    assert os.environ[KEY] == "the cluster's"
