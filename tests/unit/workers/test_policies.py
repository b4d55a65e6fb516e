"""Decisions about failures: root cause, restart, back-off, silence, hang."""

import pytest

from workers.decisions import policies
from workers.decisions.policies import Failure, FailureKind, Progress, RestartHistory
from workers.protocol.job import RestartConfig
from workers.protocol.states import StatusReason

DIED = Failure(FailureKind.PROCESS_DIED, "its process died", rank=1)
POLICY = RestartConfig(max_failures=3, backoff_s=1.0)


def decide(
    cause: Failure = DIED,
    history: RestartHistory | None = None,
    commit: int = 0,
    policy: RestartConfig = POLICY,
):
    return policies.decide_restart(
        policy, history or RestartHistory(), cause, commit, jitter=0.0
    )


@pytest.mark.parametrize(
    ("type_name", "message", "kind"),
    [
        ("UnusableDataError", "/data/train/0/path: nothing there", FailureKind.USER),
        (
            "ConfigError",
            "model.vocab_size=10 is smaller than the tokenizer's 256",
            FailureKind.USER,
        ),
        ("OutOfMemoryError", "CUDA out of memory", FailureKind.OOM),
        (
            "RuntimeError",
            "[enforce fail] DefaultCPUAllocator: can't allocate memory",
            FailureKind.OOM,
        ),
        (
            "RuntimeError",
            "[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.1]",
            FailureKind.COLLATERAL,
        ),
        (
            "DistBackendError",
            "NCCL error: remote process exited or there was a network error",
            FailureKind.COLLATERAL,
        ),
        ("StorageError", "cannot write x: No space left on device", FailureKind.STORAGE),
        ("AccessDeniedError", "cannot write x: Permission denied", FailureKind.STORAGE),
        ("InvalidLocationError", "cannot open x://y: unknown scheme", FailureKind.STORAGE),
        ("LookupError", "connection closed by peer", FailureKind.EXCEPTION),
        ("RuntimeError", "shape mismatch", FailureKind.EXCEPTION),
    ],
)
def test_classes_of_exceptions(type_name: str, message: str, kind: FailureKind) -> None:
    assert policies.classify(type_name, message) is kind


def test_an_echo_that_arrives_first_is_not_the_cause() -> None:
    echo = Failure(FailureKind.COLLATERAL, "connection closed", rank=0, order=0)
    later_echo = Failure(FailureKind.COLLATERAL, "connection closed", rank=2, order=2)
    assert (
        policies.root_cause(
            [echo, Failure(FailureKind.PROCESS_DIED, "died", rank=1, order=1), later_echo]
        ).rank
        == 1
    )
    assert policies.root_cause([echo, later_echo]).rank == 0
    with pytest.raises(ValueError, match="no failure"):
        policies.root_cause([])


def test_every_kind_has_a_rank_and_a_reason() -> None:
    assert set(policies.RANKED) == set(FailureKind)
    assert all(isinstance(Failure(kind, "").reason, StatusReason) for kind in FailureKind)


@pytest.mark.parametrize("kind", [FailureKind.USER, FailureKind.OOM, FailureKind.NAN_LOSS])
def test_what_would_only_repeat_is_not_tried_again(kind: FailureKind) -> None:
    decision = decide(Failure(kind, "no", rank=3))
    assert not decision.retry
    assert decision.message == "rank 3: no (not tried again: it would only repeat)"
    assert decision.history == RestartHistory()


def test_first_try_is_immediate_then_waits_double() -> None:
    assert [policies.backoff_s(POLICY, failures, 0.0) for failures in range(1, 6)] == [
        0,
        1,
        2,
        4,
        8,
    ]
    assert policies.backoff_s(POLICY, 40, 0.0) == 60
    assert policies.backoff_s(POLICY, 3, 0.5) == pytest.approx(1.5)


def test_budget_of_failures() -> None:
    history = RestartHistory(failures=3, commits_at_failure=(5, 10, 15))
    decision = decide(history=history, commit=20)
    assert not decision.retry
    assert decision.reason is StatusReason.BUDGET_SPENT
    assert "failure 4, restart.max_failures is 3" in decision.message
    alone = decide(policy=RestartConfig(max_failures=0))
    assert alone.reason is StatusReason.WORKER_DIED, (
        "the only failure is the reason, not the budget"
    )


def test_preemptions_have_a_budget_of_their_own() -> None:
    cause = Failure(FailureKind.PREEMPTED, "node drained")
    decision = decide(cause, RestartHistory(failures=3))
    assert decision.retry
    assert decision.history == RestartHistory(failures=3, preemptions=1)
    spent = decide(
        cause, RestartHistory(preemptions=2), policy=RestartConfig(max_preemptions=2)
    )
    assert not spent.retry
    assert spent.reason is StatusReason.BUDGET_SPENT


@pytest.mark.parametrize(
    ("before", "commit", "retry"),
    [
        ((), 0, True),
        ((0,), 0, True),
        ((0, 0), 0, False),
        ((50, 50), 50, True),
        ((50, 50, 50), 50, False),
        ((0, 0), 5, True),
    ],
)
def test_crash_loop_guard(before: tuple[int, ...], commit: int, retry: bool) -> None:
    history = RestartHistory(failures=len(before), commits_at_failure=before)
    decision = decide(
        history=history, commit=commit, policy=RestartConfig(max_failures=100)
    )
    assert decision.retry is retry
    if not retry:
        assert decision.reason is StatusReason.NO_PROGRESS
        assert (
            f"3 attempts failed without a checkpoint beyond step {commit}"
            in decision.message
        )


def test_silence() -> None:
    heard = {rank: 100.0 - rank % 2 * 20 for rank in range(4096)}
    assert policies.silent_ranks(100.0, heard, 15.0) == tuple(range(1, 4096, 2))


def test_hang_waits_for_ten_of_the_longest_gaps() -> None:
    progress = Progress(0.0)
    assert policies.hang(1000.0, progress) is None, "the first step may take long"
    assert "1801 s" in (policies.hang(1801.0, progress) or "")
    progress = progress.advanced(900.0).advanced(930.0)
    assert progress.longest_gap_s == 30.0
    assert policies.hang(930.0 + 299, progress) is None
    assert (
        policies.hang(930.0 + 301, progress)
        == "no rank reported anything for 301 s (limit 300 s)"
    )
    assert policies.hang(10.0 + 121, Progress(10.0, 0.1, 5)) is not None


def test_errors_of_ranks_in_words() -> None:
    assert policies.describe_error({"type": "ValueError", "message": "bad"}) == (
        FailureKind.EXCEPTION,
        "ValueError: bad",
    )
    assert policies.describe_error({"type": "UserError", "message": "bad"}) == (
        FailureKind.USER,
        "bad",
    )
    assert policies.describe_error({})[0] is FailureKind.EXCEPTION
