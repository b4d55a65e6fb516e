"""Runs that end at a limit of their config."""

from megatron_ray.commands import Command
from megatron_ray.training.exits import with_time_limit


def test_the_run_ends_at_its_deadline_whatever_else_is_commanded() -> None:
    times = iter([100.0, 109.9, 110.0, 110.0])
    commands = iter([Command.CHECKPOINT, Command.CONTINUE, Command.CHECKPOINT_AND_STOP])
    poll = with_time_limit(lambda: next(commands), 10.0, 0, lambda: next(times))
    assert [poll(), poll(), poll()] == [Command.CHECKPOINT, Command.EXIT, Command.EXIT]
    assert Command.EXIT.saves
    assert Command.EXIT.stops


def test_one_clock_decides_for_all_ranks() -> None:
    def poll() -> Command:
        return Command.CONTINUE

    assert with_time_limit(poll, 10.0, 1) is poll
    assert with_time_limit(poll, None, 0) is poll
