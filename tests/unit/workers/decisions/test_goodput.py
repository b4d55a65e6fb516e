"""Which time of a job counts as progress."""

import pytest

from workers.decisions.goodput import Goodput


def test_repeated_steps_and_recoveries_cost_and_waiting_without_resources_does_not() -> (
    None
):
    goodput = Goodput()
    assert goodput.ratio(0.0) is None
    goodput.held(100.0)
    goodput.held(105.0)
    for step in (1, 2, 3):
        goodput.step(step, 10.0)
    assert goodput.ratio(140.0) == pytest.approx(30 / 40)
    # Paused for an hour; then a rank dies, and step 3 is made again.
    goodput.released(140.0)
    assert goodput.ratio(3740.0) == pytest.approx(30 / 40)
    goodput.held(3740.0)
    goodput.step(3, 10.0)
    goodput.step(4, 10.0)
    assert goodput.ratio(3770.0) == pytest.approx(40 / 70)


def test_steps_from_before_the_driver_do_not_give_more_than_all() -> None:
    goodput = Goodput()
    goodput.held(0.0)
    goodput.step(1, 50.0)
    assert goodput.ratio(1.0) == 1.0
