"""Which ranks are slow."""

from collections.abc import Mapping

import pytest

from workers.decisions.ranks.stragglers import (
    WINDOW_S,
    WINDOWS,
    Pace,
    StragglerWatch,
    describe_slow,
)


class Job:
    """Ranks that make ten steps a window, each with its own seconds a step."""

    def __init__(self, *groups: tuple[int, ...]) -> None:
        self.now = 100.0
        self.watch = StragglerWatch(groups, self.now)
        self.paces = {rank: Pace() for group in groups for rank in group}
        self.watch = self.watch.observed(self.now, self.paces)

    def window(
        self, own_s: Mapping[int, float], *, step_s: float = 1.0, steps: int = 10
    ) -> tuple[int, ...]:
        self.now += WINDOW_S
        for rank, pace in self.paces.items():
            seconds = own_s.get(rank, 0.1)
            self.paces[rank] = Pace(
                pace.steps + steps,
                pace.own_s + steps * seconds,
                pace.step_s + steps * step_s,
            )
        self.watch = self.watch.observed(self.now, self.paces)
        return tuple(self.watch.slow)


def test_a_rank_is_slow_after_three_windows_and_recovers_after_three() -> None:
    job = Job((0, 1, 2, 3))
    slow = {2: 0.3}
    assert [job.window(slow, step_s=0.5) for _ in range(WINDOWS)] == [(), (), (2,)]
    assert job.watch.slow[2].ratio == pytest.approx(3.0)
    assert describe_slow(job.watch.slow[2], "192.0.2.2") == (
        "rank 2 on 192.0.2.2 is slow: its own work takes 300.0 ms a step, 3.0 times the median "
        "of its pipeline stage (100.0 ms); all others wait for it"
    )
    assert job.window(slow) == (2,)
    assert [job.window({}) for _ in range(WINDOWS)] == [(2,), (2,), ()]


def test_a_rank_between_the_two_limits_stays_what_it_is() -> None:
    job = Job((0, 1))
    between = {1: 0.12}
    for _ in range(2 * WINDOWS):
        assert job.window(between, step_s=0.2) == ()
    for _ in range(WINDOWS):
        job.window({1: 0.5}, step_s=0.5)
    for _ in range(2 * WINDOWS):
        assert job.window(between, step_s=0.2) == (1,)


def test_single_slow_windows_do_not_count() -> None:
    job = Job((0, 1))
    for _ in range(5):
        assert job.window({1: 0.9}) == ()
        assert job.window({1: 0.9}) == ()
        assert job.window({}) == ()


def test_stages_of_a_pipeline_are_not_compared() -> None:
    job = Job((0, 1), (2, 3), (4,))
    for _ in range(2 * WINDOWS):
        assert job.window({2: 0.9, 3: 0.9, 4: 5.0}) == ()
    for _ in range(WINDOWS):
        slow = job.window({2: 0.9, 3: 0.2})
    assert slow == (2,)


def test_a_difference_that_costs_nothing_is_no_event() -> None:
    job = Job((0, 1))
    for _ in range(2 * WINDOWS):
        assert job.window({0: 0.001, 1: 0.01}, step_s=1.0) == ()


def test_a_window_has_enough_steps_of_every_rank() -> None:
    job = Job((0, 1))
    for _ in range(4 * WINDOWS):
        assert job.window({1: 0.9}, steps=1) == ()
    # Five steps in five windows make one; three of these decide.
    for _ in range(3 * WINDOWS):
        slow = job.window({1: 0.9}, steps=1)
    assert slow == (1,)


def test_a_new_attempt_begins_anew() -> None:
    job = Job((0, 1))
    job.window({1: 0.9})
    job.paces = {0: Pace(), 1: Pace()}
    job.watch = job.watch.observed(job.now + 60, job.paces)
    assert job.watch.begin == job.paces
