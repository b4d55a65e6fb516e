"""Blending, sampling and putting both on prepared corpora."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ray.data.blend import (
    BlendedDataset,
    build_blend_indices,
    normalized,
    samples_needed,
)
from megatron_ray.data.datasets import build_dataset
from megatron_ray.data.indexed import IndexedDatasetBuilder
from megatron_ray.data.prepared import PreparedCorpus
from megatron_ray.data.sampler import sample_ids

weights_strategy = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6)


class Counting:
    """Sample i of dataset `name` is [name, i]."""

    def __init__(self, name: int, size: int) -> None:
        self._name = name
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self._name, index], np.int64)

    def document_starts(self, index: int) -> np.ndarray:
        return np.array([True, index == 0])


def test_greedy_order_by_hand() -> None:
    arrays = build_blend_indices([3, 1], 8)
    assert arrays["dataset_index"].tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    assert arrays["dataset_sample_index"].tolist() == [0, 0, 1, 2, 3, 1, 4, 5]
    assert (arrays["dataset_index"].dtype, arrays["dataset_sample_index"].dtype) == (
        np.dtype(np.int16),
        np.dtype(np.int64),
    )


@given(weights=weights_strategy, size=st.integers(1, 300))
def test_every_prefix_keeps_the_proportions_and_each_dataset_its_order(
    weights: list[float], size: int
) -> None:
    arrays = build_blend_indices(weights, size)
    shares = normalized(weights)
    for dataset, (share, needed) in enumerate(
        zip(shares, samples_needed(weights, size), strict=True)
    ):
        mine = arrays["dataset_index"] == dataset
        taken = np.cumsum(mine)
        assert (taken <= share * np.arange(1, size + 1) + 1).all()
        assert (taken >= share * np.arange(1, size + 1) - len(weights)).all()
        assert arrays["dataset_sample_index"][mine].tolist() == list(range(int(mine.sum())))
        assert mine.sum() <= needed


def test_blended_dataset_serves_from_the_chosen(tmp_path: Path) -> None:
    for _ in range(2):
        blend = BlendedDataset([Counting(0, 9), Counting(1, 9)], [1, 1], 4, str(tmp_path))
        assert [blend[i].tolist() for i in range(len(blend))] == [
            [0, 0],
            [1, 0],
            [0, 1],
            [1, 1],
        ]
    with pytest.raises(IndexError, match="sample 4 of 4"):
        blend[4]


def test_blend_errors() -> None:
    with pytest.raises(
        ValueError, match="the blend takes 2 samples of dataset 1, which has 1"
    ):
        BlendedDataset([Counting(0, 9), Counting(1, 1)], [1, 1], 4)
    with pytest.raises(ValueError, match="1 datasets with 2 weights"):
        BlendedDataset([Counting(0, 9)], [1, 1], 4)
    with pytest.raises(ValueError, match="weights are positive, not 0"):
        normalized([1, 0])
    with pytest.raises(ValueError, match="a blend has 1 to 32767 datasets, not 0"):
        normalized([])


@given(
    consumed=st.integers(0, 1000),
    micro=st.integers(1, 4),
    steps=st.integers(1, 3),
    blocks=st.sampled_from([(1, 12), (2, 6), (3, 4), (6, 2)]),
)
def test_a_step_consumes_the_same_blocks_at_every_dp(
    consumed: int, micro: int, steps: int, blocks: tuple[int, int]
) -> None:
    dp, num_microbatches = blocks
    batch = 12 * micro
    for step in range(steps):
        start = consumed + step * batch
        ids_by_rank = [
            sample_ids(start, micro, rank, dp, num_microbatches) for rank in range(dp)
        ]
        assert np.sort(np.concatenate(ids_by_rank).ravel()).tolist() == list(
            range(start, start + batch)
        )
        alone = sample_ids(start, micro, 0, 1, 12).tolist()
        assert sorted(block for ids in ids_by_rank for block in ids.tolist()) == alone


def test_sampler_layout_and_errors() -> None:
    assert sample_ids(10, 2, 1, 2, 3).tolist() == [[12, 13], [16, 17], [20, 21]]
    with pytest.raises(ValueError, match="dp_rank=2 dp=2"):
        sample_ids(0, 1, 2, 2, 1)


def corpus(tmp_path: Path, name: str, weight: float, token: int) -> PreparedCorpus:
    with IndexedDatasetBuilder(tmp_path / name, np.dtype(np.uint16)) as builder:
        builder.add([token] * 50)
        builder.end_document()
    return PreparedCorpus(
        prefix=str(tmp_path / name), weight=weight, num_tokens=50, num_documents=1
    )


def test_build_dataset(tmp_path: Path) -> None:
    one = corpus(tmp_path, "one", 3, 1)
    two = corpus(tmp_path, "two", 1, 2)
    alone = build_dataset([one], 30, 4, 1, str(tmp_path))
    assert len(alone) >= 30
    blend = build_dataset([one, two], 40, 4, 1, str(tmp_path))
    assert len(blend) == 40
    tokens = [int(blend[i][0]) for i in range(40)]
    assert (tokens.count(1), tokens.count(2)) == (30, 10)
    assert (tmp_path / "indices").is_dir()
