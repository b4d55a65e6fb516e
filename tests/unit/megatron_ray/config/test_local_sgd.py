"""When fragments of a model are due, and which parameters they have."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config.local_sgd import LocalSGDConfig


def due(every: int, fragments: int, steps: int) -> list[list[int]]:
    """The fragments that are due after each step."""
    config = LocalSGDConfig(groups=2, sync_every=every, fragments=fragments)
    return [
        [part for part in range(fragments) if config.is_due(step, every, part)]
        for step in range(1, steps + 1)
    ]


def test_each_fragment_is_due_once_a_period_and_the_fragments_are_spread() -> None:
    assert due(3, 1, 6) == [[], [], [0], [], [], [0]]
    assert due(6, 3, 7) == [[], [2], [], [1], [], [0], []]
    assert due(1, 1, 2) == [[0], [0]]
    steps = due(7, 4, 70)
    assert max(len(parts) for parts in steps) == 1
    counts = Counter(part for parts in steps for part in parts)
    assert counts == dict.fromkeys(range(4), 10)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("embedding.weight", 0),
        ("position_embedding.weight", 0),
        ("layers.0.attention.q.weight", 0),
        ("layers.5.mlp.down.weight", 2),
        ("mtp.1.norm.weight", 1),
        ("final_norm.weight", 2),
        ("head.weight", 2),
    ],
)
def test_layers_take_turns(name: str, fragment: int) -> None:
    config = LocalSGDConfig(groups=2, sync_every=9, fragments=3)
    assert config.fragment_of(name) == fragment


def test_periods_of_moments_are_whole_numbers() -> None:
    every: dict[str, Any] = {"exp_avg": "1e2", "exp_avg_sq": 7}
    config = LocalSGDConfig(groups=2, sync_every=2, sync_moments_every=every)
    assert config.sync_moments_every == {"exp_avg": 100, "exp_avg_sq": 7}
    for wrong in (0, True, "often", 1.5):
        every = {"exp_avg": wrong}
        with pytest.raises(ValidationError) as caught:
            LocalSGDConfig(groups=2, sync_every=2, sync_moments_every=every)
        (error,) = caught.value.errors()
        assert error["loc"][0] == "sync_moments_every"
