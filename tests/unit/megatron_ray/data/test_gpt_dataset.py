"""Sample order, against megatron-core and against a plain re-statement of its loop."""

import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ray.data import gpt_dataset
from megatron_ray.data.gpt_dataset import (
    GPTDataset,
    build_indices,
    build_sample_index,
    plan_epochs,
)
from megatron_ray.data.indexed import IndexedDataset, IndexedDatasetBuilder
from tests.support.corpus_files import write_prepared

GOLDEN = json.loads(
    (Path(__file__).parents[3] / "golden" / "megatron_data.json").read_text()
)


def corpus_of(prefix: Path, sequences: list[list[int]]) -> IndexedDataset:
    with IndexedDatasetBuilder(prefix, np.dtype(np.uint16)) as builder:
        for sequence in sequences:
            builder.add(sequence)
            builder.end_sequence()
            builder.end_document()
    return IndexedDataset(str(prefix))


@pytest.mark.parametrize(
    "case", GOLDEN["gptdataset"], ids=lambda case: f"seed{case['seed']}"
)
@pytest.mark.parametrize("cached", [False, True])
def test_equal_to_megatron_core(tmp_path: Path, case: dict[str, Any], cached: bool) -> None:
    corpus = corpus_of(
        tmp_path / "c",
        [sequence for document in GOLDEN["indexed"]["documents"] for sequence in document],
    )
    cache = str(tmp_path / "cache") if cached else None
    for _ in range(2):
        dataset = GPTDataset(corpus, case["num_samples"], case["seq"], case["seed"], cache)
        assert len(dataset) == case["len"]
        assert dataset.document_index.tolist() == case["document_index"]
        assert dataset.sample_index.tolist() == case["sample_index"]
        assert dataset.shuffle_index.tolist() == case["shuffle_index"]
        # The golden run's tokenizer calls 95 padding, and Megatron shows padding as 0
        # after masking it; we have no padding.
        served = [
            np.where(dataset[i] == 95, 0, dataset[i]).tolist() for i in range(len(dataset))
        ]
        assert served == case["windows"]
        assert dataset[0].dtype == np.int64
    assert (
        dataset.document_index.dtype,
        dataset.sample_index.dtype,
        dataset.shuffle_index.dtype,
    ) == (np.dtype(np.int32), np.dtype(np.int32), np.dtype(np.uint32))


def walk(
    lengths: list[int], document_index: list[int], num_samples: int, seq_length: int
) -> list[list[int]]:
    """The definition, token by token."""
    places = [
        [position, offset]
        for position, sequence in enumerate(document_index)
        for offset in range(lengths[sequence])
    ]
    return [[0, 0]] + [places[sample * seq_length] for sample in range(1, num_samples + 1)]


lengths_strategy = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(
    lambda values: sum(values) > 0
)


@given(
    lengths=lengths_strategy,
    num_samples=st.integers(1, 40),
    seq_length=st.integers(1, 15),
    seed=st.integers(0, 99),
)
def test_sample_index_is_the_definition(
    lengths: list[int], num_samples: int, seq_length: int, seed: int
) -> None:
    arrays = build_indices(np.array(lengths, np.int32), num_samples, seq_length, seed)
    total = len(arrays["shuffle_index"])
    assert total >= num_samples
    assert arrays["sample_index"].tolist() == walk(
        lengths, arrays["document_index"].tolist(), total, seq_length
    )
    assert sorted(arrays["shuffle_index"].tolist()) == list(range(total))


@given(
    lengths=lengths_strategy,
    num_samples=st.integers(1, 60),
    seq_length=st.integers(1, 15),
    seed=st.integers(0, 99),
)
def test_every_epoch_covers_every_sequence_once(
    lengths: list[int], num_samples: int, seq_length: int, seed: int
) -> None:
    plan = plan_epochs(sum(lengths), num_samples, seq_length)
    arrays = build_indices(np.array(lengths, np.int32), num_samples, seq_length, seed)
    documents = arrays["document_index"]
    assert sorted(documents.tolist()) == sorted(list(range(len(lengths))) * plan.epochs)
    if plan.separate_last:
        assert sorted(documents[-len(lengths) :].tolist()) == list(range(len(lengths)))
        head = arrays["shuffle_index"][: plan.samples_before_last].tolist()
        assert sorted(head) == list(range(plan.samples_before_last))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_is_a_function_of_the_seed(seed: int) -> None:
    lengths = np.arange(1, 20, dtype=np.int32)
    first, second = (build_indices(lengths, 50, 4, seed) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_chunks_of_the_sample_index_join(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([3, 0, 7, 5], np.int32)
    documents = np.array([1, 0, 2, 3, 1, 2], np.int32)
    whole = build_sample_index(lengths, documents, 10, 2)
    monkeypatch.setattr(gpt_dataset, "_CHUNK", 3)
    assert (build_sample_index(lengths, documents, 10, 2) == whole).all()


def test_last_epoch_is_apart_below_eighty_percent() -> None:
    assert not plan_epochs(1001, 100, 10).separate_last
    assert plan_epochs(1001, 179, 10).separate_last
    assert not plan_epochs(1001, 180, 10).separate_last


def test_many_builders_at_once_agree(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [[1, 2, 3, 4, 5, 6, 7]] * 9)
    orders: list[list[int]] = []

    def build() -> None:
        orders.append(
            GPTDataset(corpus, 200, 4, 1, str(tmp_path / "cache")).shuffle_index.tolist()
        )

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(orders) == 8
    assert all(order == orders[0] for order in orders)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_tells_inputs_apart(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [[1, 2, 3, 4, 5, 6, 7]] * 9)
    other = corpus_of(tmp_path / "d", [[1, 2, 3, 4, 5, 6, 7, 8]] * 9)
    cache = str(tmp_path / "cache")
    for arguments in (
        (corpus, 20, 4, 1),
        (corpus, 21, 4, 1),
        (corpus, 20, 3, 1),
        (corpus, 20, 4, 2),
        (other, 20, 4, 1),
    ):
        GPTDataset(*arguments, cache)
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_errors(tmp_path: Path) -> None:
    dataset = GPTDataset(corpus_of(tmp_path / "c", [[1, 2, 3]]), 2, 1, 1)
    with pytest.raises(IndexError, match="sample 2 of 2"):
        dataset[2]
    with pytest.raises(IndexError, match="sample -1 of 2"):
        dataset[-1]
    with pytest.raises(ValueError, match="the corpus has no tokens"):
        GPTDataset(corpus_of(tmp_path / "e", [[]]), 2, 1, 1)


def test_corpus_shorter_than_a_sample_repeats(tmp_path: Path) -> None:
    dataset = GPTDataset(corpus_of(tmp_path / "c", [[1, 2, 3]]), 2, 5, 1)
    assert dataset[0].tolist() == [1, 2, 3, 1, 2, 3]


def stream(dataset: GPTDataset) -> list[int]:
    """The tokens of all samples in order; neighbours share one."""
    tokens: list[int] = dataset[0].tolist()
    for index in range(1, len(dataset)):
        assert dataset[index][0] == tokens[-1]
        tokens += dataset[index][1:].tolist()
    return tokens


@pytest.mark.parametrize("num_samples", [1, 3, 20])
def test_without_shuffling_samples_are_in_the_order_of_the_corpus_pass_after_pass(
    tmp_path: Path, num_samples: int
) -> None:
    corpus = corpus_of(tmp_path / "c", [[1, 2, 3], [], [4], [5, 6, 7, 8]])
    arguments = (corpus, num_samples, 3, 5, str(tmp_path / "cache"))
    for _ in range(2):
        read = stream(GPTDataset(*arguments, shuffle=False))
        assert read == ([1, 2, 3, 4, 5, 6, 7, 8] * 9)[: len(read)]
        assert len(read) > num_samples * 3
    # The cache keeps both orders apart.
    shuffled = GPTDataset(*arguments)
    assert len(shuffled) == len(GPTDataset(*arguments, shuffle=False))


@pytest.mark.parametrize("shuffle", [True, False])
def test_documents_begin_where_the_index_says(tmp_path: Path, shuffle: bool) -> None:
    # Token 10 * document + place; the second document has two sequences, the third an
    # empty one first.
    prefix = write_prepared(
        tmp_path / "ready",
        [[[10, 11, 12]], [[20, 21], [22, 23]], [[], [30, 31]], [], [[40]]],
    )
    dataset = GPTDataset(IndexedDataset(str(prefix)), 40, 4, 3, shuffle=shuffle)
    for index in range(len(dataset)):
        tokens = dataset[index].tolist()
        expected = [True]
        for previous, token in pairwise(tokens):
            expected.append(token != previous + 1)
        assert dataset.document_starts(index).tolist() == expected
