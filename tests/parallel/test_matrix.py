"""The matrix: random legal layouts with all options mixed, each equal to one rank; one
whole step of each without a device; checkpoints that go from one to another.
"""

import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ray.checkpoint.directory import commit
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from tests.parallel.test_mechanisms import train_session
from tests.parallel.test_parity import distance_from
from tests.support import parity
from tests.support.layout_matrix import AXES, ENTRIES, QUOTAS, SEED, Entry, draw
from tests.support.parity import RankResult, assemble, record_choices, worst_relative_l2
from tests.support.ranks import run_ranks

STEPS = 10
"""At most so many steps for each of so many entries."""
MATRIX = draw(int(os.environ.get("MATRIX_SEED", SEED)))
SHORT = (4, 6)
"""At most so many ranks, and so many entries: what every check runs."""


def some(entries: tuple[Entry, ...]) -> list[Any]:
    """All of them as parameters; those beyond the first few small ones belong to the
    long form.
    """
    small = [entry for entry in entries if entry.world_size <= SHORT[0]][: SHORT[1]]
    return [
        pytest.param(
            entry, id=entry.name, marks=[] if entry in small else pytest.mark.parity
        )
        for entry in entries
    ]


def alone_config(experts: bool, packed: bool, **changes: Any) -> TrainConfig:
    return Entry({"dp": 1} | ({"ep": 1} if experts else {}), None, packed).config(
        alone=True, **changes
    )


@cache
def alone(experts: bool, packed: bool, steps: int) -> tuple[RankResult, np.ndarray | None]:
    """One rank with the same model and data, and what its routers chose."""
    config = alone_config(experts, packed, steps=steps)
    (one,) = run_ranks(parity.run_layout, 1, config, timeout_s=300)
    return one, record_choices(config, one) if experts else None


def test_the_matrix_meets_every_axis_and_option_often_enough() -> None:
    met = Counter(name for entry in MATRIX for name in entry.features)
    assert len(MATRIX) == len(set(map(repr, MATRIX))) == ENTRIES
    assert all(
        sum(entry.parallel.get(axis, 1) > 1 for axis in AXES) >= 2 for entry in MATRIX
    )
    assert {name: met[name] for name in QUOTAS if met[name] < QUOTAS[name]} == {}
    assert draw() == draw(), "drawn from the seed alone"


@pytest.mark.parallel
@pytest.mark.parametrize("entry", some(MATRIX))
def test_an_entry_equals_one_rank(entry: Entry, steps: int) -> None:
    print(f"MATRIX_SEED={os.environ.get('MATRIX_SEED', SEED)}")  # noqa: T201 - shown when it fails
    steps = min(steps, STEPS)
    one, choices = alone(entry.experts, entry.packed, steps)
    config = entry.config(steps=steps)
    results = run_ranks(
        parity.run_layout, entry.world_size, config, 5, choices, timeout_s=300
    )
    gradients, expected = (
        assemble(config, [rank.gradients for rank in ranks]) for ranks in (results, [one])
    )
    distance = worst_relative_l2(gradients, expected)
    assert distance[0] <= 5e-6, distance
    for rank in results:
        np.testing.assert_allclose(rank.losses, one.losses, rtol=2e-5)
        np.testing.assert_allclose(rank.grad_norms, one.grad_norms, rtol=2e-5)
        np.testing.assert_allclose(rank.other_losses, one.other_losses, rtol=2e-5)
    weights, expected = (
        assemble(config, [rank.weights for rank in ranks]) for ranks in (results, [one])
    )
    assert (
        max(float(np.abs(weights[name] - expected[name]).max()) for name in expected)
        <= 1e-5
    )


@cache
def truth_and_bf16(experts: bool, packed: bool) -> tuple[dict[str, np.ndarray], float]:
    """Gradients in float64, and how far from them one bf16 rank is."""
    config = alone_config(experts, packed, steps=2, precision="bf16")
    _, choices = alone(experts, packed, STEPS)
    truth = run_ranks(parity.float64_gradients, 1, config, choices, timeout_s=300)[0]
    (one,) = run_ranks(parity.run_layout, 1, config, 1, choices, timeout_s=300)
    return truth, distance_from(truth, assemble(config, [one.gradients]))


@pytest.mark.parallel
@pytest.mark.parity
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in MATRIX])
def test_an_entry_in_bf16_stays_as_close_to_float64_as_one_bf16_rank(entry: Entry) -> None:
    truth, of_one = truth_and_bf16(entry.experts, entry.packed)
    config = entry.config(steps=2, precision="bf16")
    (_, choices) = alone(entry.experts, entry.packed, STEPS)
    results = run_ranks(
        parity.run_layout, entry.world_size, config, 1, choices, timeout_s=300
    )
    assert (
        distance_from(truth, assemble(config, [rank.gradients for rank in results]))
        <= 1.3 * of_one
        < 0.1
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("matrix")
    for index in range(40):
        (folder / f"{index}.txt").write_text(
            " ".join(str(index * number % 97) for number in range(300))
        )
    config = on_disk(MATRIX[0], folder, str(folder))
    return prepare(config.data, str(folder / "cache"), seq_length=32)


def on_disk(
    entry: Entry, storage: Path, source: str, *, alone: bool = False
) -> TrainConfig:
    fields = entry.config(steps=STEPS, alone=alone).model_dump()
    fields["data"] |= {"train": [{"path": source}], "tokenizer": {"kind": "bytes"}}
    fields |= {
        "storage": {"path": str(storage)},
        "checkpoint": {"every_steps": 5, "keep_last": 5},
    }
    return TrainConfig.from_mapping(fields)


# Experts choose freely here, and a tie that falls the other way is another model: they
# change places in test_expert_parallel.
_DENSE = [entry for entry in MATRIX if not entry.experts and not entry.packed]
PAIRS = [
    (_DENSE[index], _DENSE[(index + 1) % len(_DENSE)])
    for index in range(min(8, len(_DENSE)))
]


@pytest.mark.parallel
@pytest.mark.parity
@pytest.mark.parametrize(
    ("before", "after"), PAIRS, ids=[f"{a.name}--{b.name}" for a, b in PAIRS]
)
def test_a_checkpoint_goes_on_under_another_layout(
    before: Entry, after: Entry, tmp_path: Path, corpus: PreparedData
) -> None:
    source = "unused"
    one = run_ranks(
        train_session,
        1,
        on_disk(before, tmp_path / "one", source, alone=True),
        corpus,
        None,
        None,
        timeout_s=300,
    )[0]
    first = run_ranks(
        train_session,
        before.world_size,
        on_disk(before, tmp_path / "a", source),
        corpus,
        None,
        None,
        timeout_s=300,
    )[0]
    np.testing.assert_allclose(first[0], one[0], rtol=2e-5)
    halfway = first[3][0]
    commit(halfway, {}, [])
    second = run_ranks(
        train_session,
        after.world_size,
        on_disk(after, tmp_path / "b", source),
        corpus,
        halfway,
        None,
        timeout_s=300,
    )[0]
    np.testing.assert_allclose(second[0], one[0][5:], rtol=2e-5)
    np.testing.assert_allclose(second[1], one[1][5:], rtol=2e-5)
