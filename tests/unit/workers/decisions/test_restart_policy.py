"""Whether and when a failed attempt is followed by another."""

import pytest

from workers.decisions import restart_policy
from workers.decisions.failures import Failure, FailureKind
from workers.decisions.restart_policy import RestartDecision, RestartHistory
from workers.protocol.job import RestartConfig
from workers.protocol.states import StatusReason

DIED = Failure(FailureKind.PROCESS_DIED, "its process died", rank=1)
POLICY = RestartConfig(max_failures=3, backoff_s=1.0)


def decide(
    cause: Failure = DIED,
    history: RestartHistory | None = None,
    commit: int = 0,
    policy: RestartConfig = POLICY,
) -> RestartDecision:
    return restart_policy.decide_restart(
        policy, history or RestartHistory(), cause, commit, jitter=0.0
    )


@pytest.mark.parametrize(
    "kind",
    [
        FailureKind.USER,
        FailureKind.OOM,
        FailureKind.NAN_LOSS,
        FailureKind.RULE,
        FailureKind.DISK_FULL,
    ],
)
def test_what_would_only_repeat_is_not_tried_again(kind: FailureKind) -> None:
    decision = decide(Failure(kind, "no", rank=3))
    assert not decision.retry
    assert decision.message == "rank 3: no (not restarted: the error is deterministic)"
    assert decision.history == RestartHistory()


def test_a_damaged_checkpoint_costs_no_restart() -> None:
    history = RestartHistory(failures=3, commits_at_failure=(5, 5, 5))
    cause = Failure(FailureKind.CHECKPOINT, "other bytes")
    decision = decide(cause, history, 5, RestartConfig(max_failures=0))
    assert decision.retry
    assert decision.delay_s == 0
    assert decision.history == history


def test_a_bad_node_costs_no_restart() -> None:
    history = RestartHistory(failures=3, commits_at_failure=(5, 5, 5))
    cause = Failure(FailureKind.PREFLIGHT, "pre-flight: bad node 192.0.2.2")
    decision = decide(cause, history, 5, RestartConfig(max_failures=0))
    assert decision.retry
    assert decision.reason is StatusReason.BAD_NODES
    assert decision.history == history


@pytest.mark.parametrize("kind", [FailureKind.ROLLBACK, FailureKind.RECHECK])
def test_a_rule_costs_no_restart(kind: FailureKind) -> None:
    history = RestartHistory(failures=3, commits_at_failure=(5, 5, 5))
    cause = Failure(kind, "the loss of step 6 is nan", rank=0)
    decision = decide(cause, history, 5, RestartConfig(max_failures=0))
    assert (decision.retry, decision.delay_s) == (True, 0)
    assert decision.reason is StatusReason.TRAINING_RULE
    assert decision.history == history


def test_first_try_is_immediate_then_waits_double() -> None:
    assert [
        restart_policy.backoff_s(POLICY, failures, 0.0) for failures in range(1, 6)
    ] == [
        0,
        1,
        2,
        4,
        8,
    ]
    assert restart_policy.backoff_s(POLICY, 40, 0.0) == 60
    assert restart_policy.backoff_s(POLICY, 3, 0.5) == pytest.approx(1.5)


def test_an_outage_of_the_storage_is_waited_for_and_is_no_crash_loop() -> None:
    cause = Failure(FailureKind.STORAGE, "cannot read x: Input/output error", rank=0)
    history = RestartHistory()
    delays = []
    for _ in range(5):
        decision = decide(cause, history, policy=RestartConfig(max_failures=5))
        assert decision.retry
        assert decision.reason is StatusReason.STORAGE_ERROR
        delays.append(decision.delay_s)
        history = decision.history
    assert delays == [4, 8, 16, 32, 60]
    assert history == RestartHistory(failures=5)
    spent = decide(cause, history, policy=RestartConfig(max_failures=5))
    assert spent.reason is StatusReason.BUDGET_SPENT


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


def test_the_same_error_after_the_same_step_ends_the_job() -> None:
    error = Failure(FailureKind.EXCEPTION, "IndexError: 300", 1, step=7)
    first = decide(error, policy=RestartConfig(max_failures=100))
    assert first.retry
    second = decide(error, first.history, policy=RestartConfig(max_failures=100))
    assert not second.retry
    assert second.reason is StatusReason.NO_PROGRESS
    assert second.message == (
        "rank 1: IndexError: 300 (the same error after step 7 as before)"
    )


@pytest.mark.parametrize(
    "other",
    [
        Failure(FailureKind.EXCEPTION, "IndexError: 300", 1, step=8),
        Failure(FailureKind.EXCEPTION, "IndexError: 301", 1, step=7),
        Failure(FailureKind.EXCEPTION, "IndexError: 300", 1),
        Failure(FailureKind.PROCESS_DIED, "IndexError: 300", 1, step=7),
    ],
)
def test_other_errors_are_tried_again(other: Failure) -> None:
    history = RestartHistory(failures=1, last_error="step 7: IndexError: 300")
    decision = decide(other, history, commit=5, policy=RestartConfig(max_failures=100))
    assert decision.retry


def test_a_preemption_in_between_does_not_hide_a_repeated_error() -> None:
    error = Failure(FailureKind.EXCEPTION, "IndexError: 300", 1, step=7)
    preempted = decide(
        Failure(FailureKind.PREEMPTED, "node drained"), decide(error).history
    )
    assert not decide(error, preempted.history).retry
