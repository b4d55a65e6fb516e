"""A run that is lengthened serves every sample of a pass before any of them again."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_ray.data.datasets import build_dataset
from megatron_ray.data.lengthened import LengthenedDataset
from megatron_ray.data.prepared import PreparedCorpus
from tests.support.corpus_files import write_prepared

LENGTH = 4


def corpus(folder: Path, name: str, first: int, num_samples: int) -> PreparedCorpus:
    """A corpus of one document, whose samples begin with different tokens."""
    tokens = np.arange(first, first + num_samples * LENGTH + 1)
    write_prepared(folder / name, [[tokens.tolist()]])
    return PreparedCorpus(
        prefix=str(folder / name), num_tokens=len(tokens), num_documents=1, weight=1.0
    )


def firsts(corpora: list[PreparedCorpus], planned: list[int], count: int) -> list[int]:
    *earlier, last = planned
    dataset = build_dataset(corpora, last, LENGTH, 1, earlier=earlier)
    assert len(dataset) >= last
    return [int(dataset[index][0]) for index in range(count)]


def test_the_order_so_far_continues_and_repeats_nothing_within_a_pass(
    tmp_path: Path,
) -> None:
    corpora = [corpus(tmp_path, "one", 0, 79)]
    before = firsts(corpora, [60], 60)
    after = firsts(corpora, [60, 120], 120)
    assert after[:60] == before
    assert len(set(after[:79])) == 79
    assert max(Counter(after).values()) == 2
    # Lengthened again, from an order that was lengthened.
    again = firsts(corpora, [60, 120, 300], 300)
    assert again[:120] == after
    assert max(Counter(again).values()) <= 5
    # What the first passes have left may be enough.
    assert firsts(corpora, [60, 70], 70)[:60] == before


def test_a_blend_continues_in_each_of_its_corpora(tmp_path: Path) -> None:
    corpora = [corpus(tmp_path, "one", 0, 50), corpus(tmp_path, "two", 1000, 50)]
    before = firsts(corpora, [60], 60)
    after = firsts(corpora, [60, 98], 98)
    assert after[:60] == before
    assert len(set(after)) == 98


def test_positions_and_starts_of_documents_are_those_of_the_parts(tmp_path: Path) -> None:
    corpora = [corpus(tmp_path, "one", 0, 10)]
    part = build_dataset(corpora, 10, LENGTH, 1)
    dataset = LengthenedDataset([part, part])
    assert len(dataset) == 20
    assert dataset[13].tolist() == part[3].tolist()
    assert dataset.document_starts(13).tolist() == part.document_starts(3).tolist()
    with pytest.raises(IndexError, match="sample 20 of 20"):
        dataset[20]
