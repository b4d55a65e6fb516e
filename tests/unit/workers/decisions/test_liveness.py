"""When ranks count as silent or hung."""

from workers.decisions.liveness import (
    Progress,
    hang,
    hang_limit_s,
    silence_limit_s,
    silent_ranks,
)


def test_silence() -> None:
    answered_at = {rank: 100.0 - rank % 2 * 20 for rank in range(4096)}
    assert silent_ranks(100.0, answered_at, 15.0) == tuple(range(1, 4096, 2))


def test_starting_processes_may_be_silent_for_longer() -> None:
    assert silence_limit_s(has_stepped=True) == 15.0
    assert silence_limit_s(has_stepped=False) == 90.0


def test_hang_waits_for_ten_of_the_longest_gaps() -> None:
    progress = Progress(0.0)
    assert hang(1000.0, progress) is None, "the first step may take long"
    assert "1801 s" in (hang(1801.0, progress) or "")
    progress = progress.advanced(900.0).advanced(930.0)
    assert progress.longest_gap_s == 30.0
    assert hang(930.0 + 299, progress) is None
    assert (
        hang(930.0 + 301, progress) == "no rank reported anything for 301 s (limit 300 s)"
    )
    assert hang(10.0 + 121, Progress(10.0, 0.1, 5)) is not None


def test_a_limit_of_the_spec_holds_after_the_first_step() -> None:
    progress = Progress(0.0, is_starting=True).advanced(60.0, has_stepped=False)
    assert hang_limit_s(progress, 10.0) == 1800.0, "the first step may load and compile"
    assert hang_limit_s(progress) == 1800.0
    assert hang_limit_s(progress, 7200.0) == 7200.0
    progress = progress.advanced(110.0)
    assert hang_limit_s(progress, 10.0) == 10.0, "that gap is not one between steps"
    progress = progress.advanced(112.0)
    assert hang_limit_s(progress, 10.0) == 10.0
    assert hang(123.0, progress, 10.0) == (
        "no rank reported anything for 11 s (limit 10 s)"
    )
    # An evaluation between two steps.
    progress = progress.advanced(118.0)
    assert hang_limit_s(progress, 10.0) == 18.0
    assert hang_limit_s(progress) == 500.0, "ten of the longest gap, the first step's too"
    assert hang_limit_s(progress, 600.0) == 600.0
