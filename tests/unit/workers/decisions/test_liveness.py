"""When ranks count as silent or hung."""

import pytest

from workers.decisions.liveness import (
    Progress,
    hang,
    hang_limit_s,
    silence_limit_s,
    silent_ranks,
    silent_with_nodes,
)


def test_silence() -> None:
    answered_at = {rank: 100.0 - rank % 2 * 20 for rank in range(4096)}
    assert silent_ranks(100.0, answered_at, 15.0) == tuple(range(1, 4096, 2))


def test_starting_processes_may_be_silent_for_longer() -> None:
    assert silence_limit_s(has_stepped=True) == 14.5
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


@pytest.mark.parametrize(
    ("answered_at", "silent"),
    [
        # None has reached the limit of 15 s at 100 s.
        ({0: 99.0, 1: 87.0, 2: 99.0, 3: 99.0}, ()),
        # The process of rank 1 alone: its neighbour has answered.
        ({0: 99.0, 1: 84.0, 2: 99.0, 3: 99.0}, (1,)),
        # Its whole node, whose other rank answered a little later.
        ({0: 85.5, 1: 84.0, 2: 99.0, 3: 99.0}, (0, 1)),
        # Ranks of other nodes count on their own.
        ({0: 85.5, 1: 84.0, 2: 86.0, 3: 99.0}, (0, 1)),
        ({0: 85.5, 1: 84.0, 2: 86.0, 3: 84.0}, (0, 1, 2, 3)),
    ],
)
def test_ranks_of_a_frozen_node_are_silent_together(
    answered_at: dict[int, float], silent: tuple[int, ...]
) -> None:
    node_of = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert silent_with_nodes(100.0, answered_at, node_of, 15.0) == silent
