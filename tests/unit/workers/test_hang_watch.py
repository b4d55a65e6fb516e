"""A run under torchrun that makes no progress prints where it is."""

from megatron_ray.reports import PhaseReport, StepReport
from workers.hang_watch import HangWatch


def step(number: int) -> StepReport:
    return StepReport(number, 1.0, 1.0, 0.1, 8, number, 0.1, 80.0, 0.0, 0)


def test_a_hang_is_printed_once_until_the_next_report() -> None:
    now = 0.0
    printed: list[str] = []
    watch = HangWatch(2, 10.0, printed.append, clock=lambda: now)
    watch.advanced(PhaseReport("model", 1.0))
    for number in range(1, 4):
        now += 1.0
        watch.advanced(step(number))
    now += 9.0
    watch.check()
    assert printed == []
    now += 2.0
    watch.check()
    watch.check()
    (text,) = printed
    first, *stack = text.splitlines()
    assert first.startswith("rank 2: no report for 11 s (limit 10 s) after step 3; it ")
    assert "gather_evidence (workers/rank/evidence.py:" in stack[0]
    now += 1.0
    watch.advanced(step(4))
    now += 60.0
    watch.check()
    assert len(printed) == 2


def test_the_first_step_may_take_long() -> None:
    now = 0.0
    printed: list[str] = []
    watch = HangWatch(0, 10.0, printed.append, clock=lambda: now)
    watch.advanced(PhaseReport("model", 1.0))
    now += 1799.0
    watch.check()
    assert printed == []
    now += 2.0
    watch.check()
    assert len(printed) == 1
