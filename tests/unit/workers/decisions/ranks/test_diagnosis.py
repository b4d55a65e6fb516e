"""Which rank a job waits for."""

from collections.abc import Mapping
from typing import Any

from workers.decisions.ranks.diagnosis import (
    DEVICE,
    Confidence,
    Diagnosis,
    Frame,
    GroupCounts,
    RankEvidence,
    Wait,
    diagnose,
    stacks_by_ranks,
)

READS = (
    Frame("numpy/memmap.py", 10, "memmap.__getitem__"),
    Frame("megatron_ray/data/indexed.py", 88, "IndexedCorpus.read"),
    Frame("megatron_ray/training/loop.py", 86, "_train_step"),
)
WAITS = (Frame("megatron_ray/distributed/collectives.py", 56, "_Recorded.wait"),)


def counts(entered: int, group: int = 0, **messages: Mapping[int, int]) -> GroupCounts:
    return GroupCounts(group, entered, **messages)


def waits_in(
    operation: str, axis: str, number: int, *, group: int = 0, seconds: float = 12.0
) -> Wait:
    return Wait(operation, axis, number, group, seconds)


def row(rank: int, **fields: Any) -> RankEvidence:
    frames = WAITS if fields.get("wait") else READS
    return RankEvidence(rank, fields.pop("phase", "data"), frames=frames, **fields)


def hung(*rows: RankEvidence, silent: tuple[int, ...] = ()) -> Diagnosis:
    evidence: dict[int, RankEvidence | None] = {item.rank: item for item in rows}
    evidence |= dict.fromkeys(silent)
    return diagnose(evidence, 120.0, is_hang=True)


def test_a_rank_that_has_not_entered_what_its_peers_wait_in_is_the_culprit() -> None:
    peers = [
        row(rank, wait=waits_in("all_reduce", "tp", 812), groups={"tp": counts(812)})
        for rank in (0, 2, 3)
    ]
    diagnosis = hung(*peers, row(1, groups={"tp": counts(811)}))
    assert diagnosis.culprits == (1,)
    assert diagnosis.confidence is Confidence.HIGH
    assert diagnosis.reason == (
        "rank 1 has not entered all_reduce 812 of tp, in which rank 0 has waited for 12 s; it "
        "reads data in memmap.__getitem__ (numpy/memmap.py:10), called by IndexedCorpus.read "
        "(megatron_ray/data/indexed.py:88)"
    )


def test_of_several_groups_the_rank_that_waits_for_none_is_the_culprit() -> None:
    # 0 waits for 1 in tp; 1 waits for 3 in dp; 2 waits for 3 in tp; 3 waits for none.
    diagnosis = hung(
        row(
            0,
            wait=waits_in("all_gather", "tp", 9),
            groups={"tp": counts(9), "dp": counts(4)},
        ),
        row(
            1,
            wait=waits_in("all_reduce", "dp", 5, group=1, seconds=20),
            groups={"tp": counts(8), "dp": counts(5, 1)},
        ),
        row(
            2,
            wait=waits_in("all_gather", "tp", 9, group=2),
            groups={"tp": counts(9, 2), "dp": counts(4)},
        ),
        row(3, groups={"tp": counts(8, 2), "dp": counts(4, 1)}),
    )
    assert diagnosis.culprits == (3,)
    assert diagnosis.confidence is Confidence.HIGH
    assert "all_reduce 5 of dp, in which rank 1 has waited for 20 s" in diagnosis.reason


def test_messages_of_a_pipeline_are_followed_to_the_stage_that_stopped() -> None:
    def receive(number: int, peer: int) -> Wait:
        return Wait("receive", "pp", number, 0, 15.0, peer)

    first = row(0, groups={"pp": counts(0, sent={1: 3})}, phase="forward_backward")
    second = row(
        1, wait=receive(4, 0), groups={"pp": counts(0, sent={2: 3}, received={0: 4})}
    )
    third = row(2, wait=receive(4, 1), groups={"pp": counts(0, received={1: 4})})
    diagnosis = hung(first, second, third)
    assert diagnosis.culprits == (0,)
    assert "message 4 of pp (receive)" in diagnosis.reason
    # A message that was sent and does not come is the transport's.
    first = row(
        0, wait=Wait("send", "pp", 4, 0, 15.0, 1), groups={"pp": counts(0, sent={1: 4})}
    )
    assert hung(first, second, third).culprits == ()


def test_a_rank_that_does_not_answer_is_the_culprit_if_peers_may_wait_for_it() -> None:
    waiting = row(0, wait=waits_in("all_reduce", "world", 7), groups={"world": counts(7)})
    diagnosis = hung(waiting, silent=(1,))
    assert diagnosis.culprits == (1,)
    assert diagnosis.confidence is Confidence.HIGH
    assert diagnosis.reason == (
        "rank 1 does not answer, and rank 0 has waited in all_reduce 7 of world for 12 s"
    )
    # Another rank that is behind explains the wait better.
    behind = row(2, groups={"world": counts(6)})
    assert hung(waiting, behind, silent=(1,)).culprits == (2,)
    diagnosis = hung(row(0, groups={}), silent=(1, 2))
    assert (diagnosis.culprits, diagnosis.confidence) == ((1, 2), Confidence.MEDIUM)


def test_a_device_that_waits_is_traced_to_the_host_that_is_behind() -> None:
    device = Wait(DEVICE, "", 0, 0, 30.0)
    diagnosis = hung(
        row(0, wait=device, groups={"tp": counts(40), "dp": counts(10)}),
        row(1, groups={"tp": counts(31), "dp": counts(9, 1)}),
    )
    assert diagnosis.culprits == (1,)
    assert "behind its peers" in diagnosis.reason


def test_members_in_different_collectives_have_taken_different_paths() -> None:
    rows = [
        row(rank, wait=waits_in("all_reduce", "tp", 3), groups={"tp": counts(3)})
        for rank in (0, 1)
    ]
    other = row(2, wait=waits_in("all_gather", "tp", 3), groups={"tp": counts(3)})
    diagnosis = hung(*rows, other)
    assert diagnosis.culprits == (2,)
    assert "taken different paths" in diagnosis.reason


def test_ranks_that_wait_for_each_other_are_named_together() -> None:
    diagnosis = hung(
        row(
            0,
            wait=waits_in("all_reduce", "tp", 5),
            groups={"tp": counts(5), "dp": counts(1)},
        ),
        row(
            1,
            wait=waits_in("all_reduce", "dp", 2),
            groups={"tp": counts(4), "dp": counts(2)},
        ),
    )
    assert diagnosis.culprits == (0, 1)
    assert "wait for each other" in diagnosis.reason


def test_without_a_rank_that_stands_out_none_is_accused() -> None:
    rows = [
        row(rank, wait=waits_in("all_reduce", "dp", 3), groups={"dp": counts(3)})
        for rank in range(4)
    ]
    diagnosis = hung(*rows)
    assert (diagnosis.culprits, diagnosis.confidence) == ((), Confidence.LOW)
    assert "ranks 0, 1, 2 and 3 wait in all_reduce 3 of dp" in diagnosis.reason
    diagnosis = hung(row(0), row(1))
    assert diagnosis.culprits == ()
    assert diagnosis.reason.startswith(
        "no rank waits in a collective; rank 0: it reads data"
    )


def test_a_single_rank_is_its_own_culprit() -> None:
    diagnosis = hung(row(0))
    assert (diagnosis.culprits, diagnosis.confidence) == ((0,), Confidence.HIGH)


def test_a_healthy_job_has_no_culprit() -> None:
    waiting = row(0, wait=waits_in("all_reduce", "tp", 3), groups={"tp": counts(3)})
    behind = row(1, groups={"tp": counts(2)})
    diagnosis = diagnose({0: waiting, 1: behind}, 0.3, is_hang=False)
    assert diagnosis.culprits == ()
    assert diagnosis.reason == "the job makes progress: a rank has reported 0.3 s ago"
    # One that has reported nothing for a while is looked at like a hung one.
    assert diagnose({0: waiting, 1: behind}, 30.0, is_hang=False).culprits == (1,)


def test_collectives_of_torch_itself_count_as_waiting() -> None:
    frames = (
        Frame("torch/distributed/distributed_c10d.py", 2900, "gather_object"),
        Frame("megatron_ray/checkpoint/index.py", 123, "_plan_on_first_rank"),
    )
    rows = [RankEvidence(rank, "checkpoint", frames=frames) for rank in range(2)]
    diagnosis = hung(*rows)
    assert diagnosis.culprits == ()
    assert "a collective of torch, gather_object" in diagnosis.reason


def test_thousands_of_ranks_take_no_time() -> None:
    wait = waits_in("all_reduce", "world", 5)
    rows = [row(rank, wait=wait, groups={"world": counts(5)}) for rank in range(2048)]
    rows[77] = row(77, groups={"world": counts(4)})
    assert hung(*rows).culprits == (77,)


def test_equal_stacks_are_listed_once_and_rare_ones_first() -> None:
    rows = [row(rank, wait=waits_in("all_reduce", "tp", 1)) for rank in range(3)]
    rows.append(row(3))
    assert stacks_by_ranks(rows, 8) == [([3], READS), ([0, 1, 2], WAITS)]
    assert stacks_by_ranks(rows, 1) == [([3], READS)]
