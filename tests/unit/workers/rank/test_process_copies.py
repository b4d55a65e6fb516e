"""The reports that rank 0's copy has, because its node may be lost with its spool."""

from dataclasses import replace
from pathlib import Path

import pytest

from workers.driver.attempt.copy_choice import lines_after
from workers.rank import process_copies
from workers.rank.environment import RankEnv
from workers.rank.messages import StartRequest
from workers.rank.peer_copies import CopyKey, KeptCopy, checksum_of
from workers.rank.process_copies import ProcessCopies
from workers.rank.spool import Spool, report_path

REQUEST = StartRequest(RankEnv(0, 2, 0, 2), {}, {}, attempt=3, device="cpu", partner=1)


@pytest.fixture
def copies(tmp_path: Path) -> ProcessCopies:
    spool = Spool(report_path(tmp_path, 3, 0), 3)
    for step in range(1, 31):
        spool.append("step", {"step": step})
    return ProcessCopies("job", "127.0.0.1", tmp_path)


def keep(copies: ProcessCopies, reports: bytes) -> None:
    parts = (memoryview(b""), memoryview(reports))
    key = CopyKey("job", "layout", 3, 30, 0)
    copies.copies.begin("layout", 3, None)
    copies.copies.keep_own(KeptCopy(key, b"{}", parts, checksum_of(b"{}", parts)))


def test_a_copy_has_the_reports_that_the_service_may_lack(copies: ProcessCopies) -> None:
    copies.stored = 27
    keep(copies, copies.unstored_reports(REQUEST))
    lines = copies.reports_in_copy(3, 30)
    assert [(line.n, line.value()["data"]["step"]) for line in lines] == [
        (28, 28),
        (29, 29),
        (30, 30),
    ]
    assert copies.reports_in_copy(3, 20) == [], "another step"


def test_only_the_oldest_reports_are_in_a_copy_while_the_service_is_away(
    copies: ProcessCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_copies, "_MAX_REPORT_BYTES", 500)
    keep(copies, copies.unstored_reports(REQUEST))
    numbers = [line.n for line in copies.reports_in_copy(3, 30)]
    assert 2 < len(numbers) < 30
    assert numbers == list(range(1, len(numbers) + 1)), "no gap, which would be refused"


def test_a_rank_without_a_spool_has_no_reports(copies: ProcessCopies) -> None:
    assert copies.unstored_reports(replace(REQUEST, attempt=4)) == b""


def test_only_reports_that_follow_are_passed_on(copies: ProcessCopies) -> None:
    keep(copies, copies.unstored_reports(REQUEST))
    lines = copies.reports_in_copy(3, 30)
    assert [line.n for line in lines_after(lines, 28)] == [29, 30]
    assert lines_after(lines, 30) == []
    assert lines_after(lines[10:], 5) == [], "the service takes no gaps"
