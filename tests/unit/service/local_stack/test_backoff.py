"""When `up` restarts a process that has exited."""

from service.local_stack.backoff import PROVEN_S, Restart, after_end


def test_a_proven_process_is_restarted_at_once_however_often_it_is_killed() -> None:
    crashes = 0
    for _ in range(20):
        restart = after_end(crashes, lived_s=4.0, ready_s=3.0)
        assert restart == Restart(wait_s=0.0, crashes=0)
        crashes = restart.crashes


def test_starts_of_a_process_that_never_works_move_apart() -> None:
    crashes = 0
    waits = []
    for _ in range(9):
        restart = after_end(crashes, lived_s=0.5, ready_s=None)
        crashes = restart.crashes
        waits.append(restart.wait_s)
    assert waits == [0.0, 0.0, 0.5, 1.5, 4.5, 9.5, 29.5, 29.5, 29.5]
    assert crashes == 9


def test_an_exit_soon_after_readiness_is_a_crash() -> None:
    assert after_end(2, lived_s=0.25, ready_s=PROVEN_S / 2) == Restart(
        wait_s=0.75, crashes=3
    )
    assert after_end(2, lived_s=20.0, ready_s=-1.0) == Restart(wait_s=0.0, crashes=3), (
        "it lived longer than starts are to be apart"
    )


def test_a_proven_process_resets_the_crashes() -> None:
    assert after_end(6, lived_s=3.0, ready_s=PROVEN_S) == Restart(wait_s=0.0, crashes=0)
