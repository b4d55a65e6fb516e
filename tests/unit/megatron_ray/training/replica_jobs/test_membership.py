"""Who synchronizes, who continues from whom, and for whom a job waits."""

from dataclasses import replace

import pytest

from megatron_ray.training.replica_jobs.membership import (
    Arrival,
    Heartbeat,
    Meeting,
    from_json,
    host_of,
    is_complete,
    split,
    to_json,
    waiting,
)


def arrival(group: int, step: int = 8, *, done: bool = False, met: str = "m") -> Arrival:
    return Arrival(group, f"job-{group}", 1, step, done, "layout", met)


def beat(group: int, *, is_host: bool = False, arrived: Arrival | None = None) -> Heartbeat:
    return Heartbeat(group, f"job-{group}", ("node", 1), 3, is_host, arrived)


def groups(arrivals: tuple[Arrival, ...]) -> list[int]:
    return [each.group for each in arrivals]


@pytest.mark.parametrize(
    ("arrivals", "members", "behind"),
    [
        ([arrival(1), arrival(0)], [0, 1], []),
        ([arrival(0, step=4), arrival(1)], [1], [0]),
        # A job that starts is behind, whatever it began from.
        ([arrival(0, step=0, done=True, met=""), arrival(1), arrival(2)], [1, 2], [0]),
        # It has more than those that have not synchronized after the same step.
        ([arrival(0), arrival(1, done=True)], [1], [0]),
        # They have synchronized apart.
        ([arrival(2, met="other"), arrival(1), arrival(3)], [1, 3], [2]),
    ],
)
def test_those_who_have_come_furthest_synchronize(
    arrivals: list[Arrival], members: list[int], behind: list[int]
) -> None:
    first, rest = split(arrivals)
    assert (groups(first), groups(rest)) == (members, behind)
    meeting = Meeting("job-1", 1, ("node", 1), first, rest)
    assert meeting.is_due is not first[0].has_synchronized
    for index, group in enumerate(members):
        assert meeting.index_of(group) == index
    for group in behind:
        assert meeting.index_of(group) is None
    assert all(meeting.includes(each) for each in arrivals)
    assert not meeting.includes(replace(arrivals[0], number=2))


def test_the_host_stays_until_it_is_lost() -> None:
    living = {group: beat(group, is_host=group == 2) for group in (1, 2, 3)}
    assert host_of(living).group == 2
    del living[2]
    assert host_of(living).group == 1
    # Two jobs that could not see each other are both hosts for a while.
    living[4] = beat(4, is_host=True)
    living[3] = beat(3, is_host=True)
    assert host_of(living).group == 3
    with pytest.raises(ValueError, match="empty"):
        host_of({})


@pytest.mark.parametrize(
    ("arrived", "num_living", "has_time", "expected"),
    [
        ([arrival(0), arrival(1)], 2, True, True),
        ([arrival(0)], 2, True, False),
        ([arrival(0)], 2, False, False),  # a living job is always waited for
        ([arrival(0, 0, done=True), arrival(1, 0, done=True)], 2, True, False),
        ([arrival(0, 0, done=True), arrival(1, 0, done=True)], 2, False, True),
        # Others train already.
        ([arrival(0, 0, done=True), arrival(1)], 2, True, True),
        ([arrival(group, 0, done=True) for group in range(3)], 3, True, True),
    ],
)
def test_all_living_jobs_are_waited_for_and_at_the_start_all_jobs(
    arrived: list[Arrival], num_living: int, has_time: bool, expected: bool
) -> None:
    living = {group: beat(group) for group in range(num_living)}
    arrivals = {each.group: each for each in arrived}
    assert is_complete(arrivals, living, 3, has_time=has_time) is expected


def test_an_arrival_is_answered_once() -> None:
    first = arrival(0)
    second = arrival(1)
    living = {0: beat(0, arrived=first), 1: beat(1, arrived=second), 2: beat(2)}
    assert waiting(living, None) == {0: first, 1: second}
    meeting = Meeting("job-0", 1, ("node", 1), (first, second), ())
    assert waiting(living, meeting) == {}
    later = replace(second, number=2, step=16)
    living[1] = beat(1, arrived=later)
    assert waiting(living, meeting) == {1: later}


def test_a_heartbeat_is_read_as_it_was_written() -> None:
    meeting = Meeting("job-0", 1, ("::1", 1), (arrival(0),), (arrival(1),))
    shown = replace(beat(0, is_host=True, arrived=arrival(0)), meeting=meeting)
    assert from_json(to_json(shown)) == shown
    assert meeting.name == "job-0/1"
    for text in (b"", b"{", b"[]", b'{"group": "x"}'):
        with pytest.raises(ValueError, match="validation error"):
            from_json(text)
