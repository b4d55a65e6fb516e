"""Text without data: the same everywhere, and of the size that is announced."""

from collections import Counter

import pytest

from megatron_ray.config.data import DataSource
from megatron_ray.data.mock import NUM_PARTS, PART_BYTES, mock_documents
from megatron_ray.data.preparation.documents import fingerprint, read_chunks
from megatron_ray.data.preparation.errors import DataError
from megatron_ray.data.preparation.sources import MOCK, find_source


def test_parts_are_the_same_everywhere_and_differ() -> None:
    first = list(mock_documents(0))
    assert first == list(mock_documents(0))
    assert first != list(mock_documents(1))
    assert sum(len(text.encode()) for text in first) == PART_BYTES


def test_words_are_as_unequally_frequent_as_in_a_language() -> None:
    counts = Counter(" ".join(mock_documents(2)).split())
    (_, most), *_ = counts.most_common(1)
    assert 0.05 < most / counts.total() < 0.25
    assert len(counts) > 3000


def test_a_source_of_it_has_documents_and_no_files() -> None:
    source = find_source(DataSource(path=MOCK))
    assert len(source.files) == NUM_PARTS
    texts = [chunk.text for chunk in read_chunks(source)]
    assert sum(len(text) for text in texts) == source.num_bytes == NUM_PARTS * PART_BYTES
    assert fingerprint(source) == fingerprint(find_source(DataSource(path=MOCK)))
    with pytest.raises(
        DataError, match="there are builtin://python-stdlib and builtin://mock"
    ):
        find_source(DataSource(path="builtin://mocks"))
