"""The split of a recovery's time."""

from workers.decisions.recovery import RecoveryWatch, describe


def test_the_split_adds_up_and_comes_with_the_first_new_step() -> None:
    watch = RecoveryWatch(noticed_at=100.0, reached=120, from_step=100)
    for phase, seconds in [
        ("import", 0.0),
        ("rendezvous", 0.2),
        ("model", 0.1),
        ("load", 0.3),
        ("data", 0.1),
    ]:
        watch.phase({"phase": phase, "seconds": seconds})
    assert watch.step(101, 102.0) is None
    assert watch.step(120, 103.0) is None
    split = watch.step(121, 103.25)
    assert split == {
        "seconds": 3.25,
        "rebuild_s": 1.5,
        "load_s": 0.5,
        "recompute_s": 1.25,
        "from_step": 100,
        "step": 121,
    }
    assert describe(split, 2).startswith(
        "recovered at step 121 in 3.2 s (attempt 2): rebuild 1.5 s, load 0.5 s"
    )


def test_a_step_that_was_never_done_needs_no_recomputing() -> None:
    split = RecoveryWatch(noticed_at=0.0, reached=100, from_step=100).step(101, 2.0)
    assert split is not None
    assert split["recompute_s"] == 0.0
