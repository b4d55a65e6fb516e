"""What follows from a step that breaks a rule, as a table."""

from collections.abc import Sequence
from itertools import product
from math import inf, nan

import pytest

from megatron_ray.config.faults.rules import RuleConfig
from megatron_ray.training.rules.verdicts import (
    Conclusion,
    conclude,
    describe_break,
    describe_ranks,
    suspect_rank,
)

FLAGS = ("is_broken", "reruns", "is_second", "was_elsewhere", "can_move")
EXPECTED = [
    # broken, has reruns, second, elsewhere, can move
    ((0, None, 0, 0, None), Conclusion.GOOD),
    ((0, None, 1, 0, None), Conclusion.TRANSIENT),
    ((0, None, None, 1, None), Conclusion.PERSISTENT),
    ((1, 0, None, None, None), Conclusion.CONFIRMED),
    ((1, 1, 0, 0, None), Conclusion.RERUN),
    ((1, 1, 1, 0, 1), Conclusion.RECHECK),
    ((1, 1, 1, 0, 0), Conclusion.CONFIRMED),
    ((1, 1, None, 1, None), Conclusion.CONFIRMED),
]
"""None stands for both; each combination of flags is in one row."""


@pytest.mark.parametrize("flags", list(product((0, 1), repeat=5)), ids=str)
def test_every_combination_has_one_conclusion(flags: tuple[int, ...]) -> None:
    rows = []
    for pattern, conclusion in EXPECTED:
        pairs = zip(pattern, flags, strict=True)
        if all(value is None or value == flag for value, flag in pairs):
            rows.append(conclusion)
    values = dict(zip(FLAGS, map(bool, flags), strict=True))
    assert rows == [conclude(**values)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"when": "not_finite"}, "the loss of step 9 is nan and its gradient norm inf"),
        (
            {"when": "loss_spike", "samples": 4},
            "the loss of step 9 is nan, above 10 times the maximum of the first 4 steps, "
            "which is 3",
        ),
        (
            {"when": "large_grad_norm", "baseline": "recent_median", "factor": 2},
            "the gradient norm of step 9 is inf, above 2 times the median of the last 100 "
            "steps, which is 15",
        ),
        (
            {"when": "loss_spike", "limit": 8},
            "the loss of step 9 is nan, above the limit of 8",
        ),
    ],
)
def test_a_sentence_has_the_numbers(rule: dict[str, object], expected: str) -> None:
    config = RuleConfig.model_validate({"action": "stop"} | rule)
    assert describe_break(config, 9, nan, inf, 30.0) == expected


@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        ([[8, 4, 1], [9, 4, 1], [0, 0, 5]], 1),
        ([[8, 4, 1], [9, 4, nan], [0, 0, 5]], 1),
        ([[8, 4, inf], [9, 4, 1], [nan, 4, 5]], 2),
        ([[0, 0, 1], [0, 0, 7]], 1),
    ],
)
def test_the_suspect_has_the_most_conspicuous_numbers(
    parts: list[list[float]], rank: int
) -> None:
    assert suspect_rank(parts) == rank


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((), ", though the own loss and gradients of every rank were finite"),
        ((3,), "; before the reduction that was so on rank 3"),
        ((3, 4), "; before the reduction that was so on ranks 3, 4"),
        (
            range(20),
            "; before the reduction that was so on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 others",
        ),
    ],
)
def test_ranks_are_named(ranks: Sequence[int], expected: str) -> None:
    assert describe_ranks(ranks) == expected
