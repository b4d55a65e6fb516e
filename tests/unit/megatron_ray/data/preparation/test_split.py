"""Splitting: the share that was asked for, copies on one side, nothing lost."""

import numpy as np
import pytest

from megatron_ray.data.indexed import IndexTable
from megatron_ray.data.preparation.split import is_near_share, split_documents


def table_of(lengths: list[int]) -> IndexTable:
    """Documents of two sequences each, whose tokens are two bytes."""
    halves = []
    for length in lengths:
        halves += [length // 3, length - length // 3]
    sizes = np.array(halves, np.int32)
    pointers = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64) * 2])
    documents = np.arange(0, len(halves) + 1, 2, dtype=np.int64)
    return IndexTable(np.dtype(np.uint16), sizes, pointers.astype(np.int64), documents)


def positions(table: IndexTable) -> list[np.ndarray]:
    """The tokens of each document, as their positions in the .bin file."""
    documents = []
    for first, end in zip(table.documents, table.documents[1:], strict=False):
        parts = [np.arange(0)]
        for sequence in range(first, end):
            start = table.pointers[sequence] // 2
            parts.append(np.arange(start, start + table.lengths[sequence]))
        documents.append(np.concatenate(parts))
    return documents


def split(
    lengths: list[int], hashes: list[int], fraction: float
) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """The documents of both sides, and the share of held-out tokens."""
    table = table_of(lengths)
    train, validation = split_documents(table, np.array(hashes, np.uint64), fraction)
    sides = positions(train), positions(validation)
    together = np.concatenate([*sides[0], *sides[1]])
    assert np.array_equal(np.sort(together), np.arange(sum(lengths))), "each token once"
    held_out = sum(len(document) for document in sides[1])
    return *sides, held_out / sum(lengths)


def drawn(count: int, seed: int, spread: float = 0.0) -> tuple[list[int], list[int]]:
    """Lengths and hashes of different documents."""
    rng = np.random.default_rng(seed)
    lengths = (200 * rng.lognormal(0, spread, count)).astype(int) + 1
    return lengths.tolist(), rng.integers(1000, 1 << 62, count).tolist()


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_many_documents_give_the_share_of_documents_and_of_tokens(
    spread: float, fraction: float
) -> None:
    for seed in range(2):
        _, validation, share = split(*drawn(300, seed, spread), fraction)
        assert is_near_share(share, fraction)
        assert is_near_share(len(validation) / 300, fraction)


def test_repeated_documents_do_not_change_the_share() -> None:
    for seed in range(3):
        lengths, hashes = drawn(100, seed)
        copied = [150 + 100 * seed] * 900
        _, validation, share = split(copied + lengths, [seed] * 900 + hashes, 0.05)
        assert is_near_share(len(validation) / 1000, 0.05)
        # Of tokens it is less where the repeated text is the longer one.
        assert 0.025 <= share <= 0.06


@pytest.mark.parametrize("repeats", [1, 2, 30])
def test_copies_are_on_one_side(repeats: int) -> None:
    lengths, hashes = drawn(100, 1, 1.0)
    train, _, share = split(lengths * repeats, hashes * repeats, 0.1)
    assert is_near_share(share, 0.1)
    starts = np.concatenate([[0], np.cumsum(lengths * repeats)])[:-1]
    in_train = {int(document[0]) for document in train}
    sides = np.isin(starts, list(in_train)).reshape(repeats, 100)
    assert (sides == sides[0]).all()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 25])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_few_documents_give_the_share_to_half_of_it(count: int, fraction: float) -> None:
    lengths = [1000 + number for number in range(count)]
    train, validation, share = split(lengths, list(range(count)), fraction)
    assert train
    assert validation
    assert abs(share - fraction) <= 0.5 * min(fraction, 1 - fraction) + 0.001


def test_a_long_document_beside_short_ones_gives_its_end() -> None:
    lengths, hashes = drawn(99, 4)
    train, validation, share = split([1_000_000, *lengths], [7, *hashes], 0.05)
    assert share == pytest.approx(0.05, abs=1e-4)
    assert len(train) == 95
    assert len(validation) == 6
    # The end of the long one, across its sequences.
    assert validation[0][-1] == 999_999
    assert len(train[0]) + len(validation[0]) == 1_000_000


def test_a_text_that_is_everything_gives_the_end_of_every_copy() -> None:
    train, validation, share = split([100] * 50, [3] * 50, 0.05)
    assert share == 0.05
    assert {len(document) for document in train} == {95}
    assert {len(document) for document in validation} == {5}


def test_texts_whose_ends_are_nothing_are_held_out_whole() -> None:
    _, validation, _ = split([4] * 30, list(range(30)), 0.01)
    assert [len(document) for document in validation] == [4]


def test_empty_documents_are_no_obstacle() -> None:
    lengths, hashes = drawn(100, 2)
    _, _, share = split([0, *lengths, 0], [1, *hashes, 1], 0.1)
    assert is_near_share(share, 0.1)
