"""What a restarted driver finds."""

from pathlib import Path

import pytest

from workers.journal import Journal, JournalEntry, JournalProblem, Phase


def test_the_highest_attempt_is_the_latest(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    assert journal.latest() is None
    for attempt in (0, 1, 10, 9):
        journal.write(JournalEntry(job_id="job-a", attempt=attempt, epoch=attempt + 1))
    latest = journal.latest()
    assert latest is not None
    assert (latest.attempt, latest.epoch) == (10, 11)
    assert (tmp_path / "attempts" / "0010.json").exists()


def test_an_entry_is_replaced_whole(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    entry = JournalEntry(job_id="job-a", store=("10.0.0.1", 4000), commits_at_failure=(1, 2))
    journal.write(entry)
    journal.write(entry.model_copy(update={"phase": Phase.RUNNING}))
    latest = journal.latest()
    assert latest == entry.model_copy(update={"phase": Phase.RUNNING})
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["0000.json"]


@pytest.mark.parametrize("text", ["", "{", '{"job_id": "a", "format_version": 2}', "[]"])
def test_what_is_no_entry_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0003.json").write_text(text)
    with pytest.raises(JournalProblem, match=r"attempts/0003.json is not a journal entry of format 1"):
        Journal(str(tmp_path)).latest()
