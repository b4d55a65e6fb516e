"""How long a job goes on while its storage fails or does not answer."""

from workers.decisions.faults import failing_storage
from workers.decisions.faults.failing_storage import retry_s, waits_for_storage
from workers.decisions.ranks.diagnosis import Frame, RankEvidence, Wait

WRITES = RankEvidence(
    0,
    "checkpoint",
    frames=(
        Frame("threading.py", 5, "wait"),
        Frame("megatron_ray/checkpoint/writer.py", 9, "_finish_pending"),
    ),
)
READS_DATA = RankEvidence(1, "data", frames=(Frame("megatron_ray/data/x.py", 5, "get"),))
WAITS = RankEvidence(
    1,
    "reduce",
    wait=Wait("all_reduce", "tp", 4, 0, 12.0),
    frames=(Frame("megatron_ray/checkpoint/writer.py", 9, "prepare"),),
)


def test_something_is_tried_again_in_growing_pauses_until_its_time_is_over() -> None:
    limit_s = failing_storage.RUNNING_S
    pauses = [retry_s(number, 0.0, limit_s) for number in (1, 2, 3, 4, 5, 6, 60)]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert retry_s(7, limit_s, limit_s) is None
    assert retry_s(1, 0.0, 0.0) is None


def test_the_storage_counts_only_where_a_culprit_is_in_it() -> None:
    assert waits_for_storage({0: WRITES, 1: WAITS}, (0,))
    assert waits_for_storage({0: WRITES, 1: None}, ())
    assert not waits_for_storage({0: WRITES, 1: READS_DATA}, (1,))
    assert not waits_for_storage({1: WAITS}, ())
    assert not waits_for_storage({0: None}, (0,))
