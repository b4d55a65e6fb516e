"""Batches: where documents begin, and each source's part of an evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ray.config.schedules.batch_sizes import RampupConfig
from megatron_ray.data.datasets import (
    EvaluationSource,
    build_dataset,
    evaluation_sources,
)
from megatron_ray.data.loader import BatchMaker, StepLoader, evaluation_batches
from megatron_ray.data.prepared import PreparedCorpus
from tests.support.corpus_files import write_prepared

CPU = torch.device("cpu")
END = 99


class Numbered:
    """Sample i is [source, i, i, i]; its last token begins a document."""

    def __init__(self, source: int) -> None:
        self._source = source

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self._source, index, index, index])

    def document_starts(self, index: int) -> np.ndarray:
        return np.array([True, False, False, True])


def sources(*counts: int) -> list[EvaluationSource]:
    made = []
    for number, count in enumerate(counts):
        made.append(EvaluationSource(f"s{number}", Numbered(number), count))
    return made


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2, 3, 7])
@pytest.mark.parametrize("counts", [(5,), (5, 1, 2), (1, 4)])
def test_replicas_share_every_sample_of_every_source_once(
    counts: tuple[int, ...], dp: int, micro_batch_size: int
) -> None:
    counted = []
    num_batches = set()
    for dp_rank in range(dp):
        batches = list(
            evaluation_batches(
                sources(*counts), micro_batch_size, dp_rank, dp, BatchMaker(CPU)
            )
        )
        num_batches.add(len(batches))
        for number, batch in batches:
            assert batch.tokens_BS.shape == (micro_batch_size, 3)
            assert set(batch.tokens_BS[:, 0].tolist()) == {number}, "one source a batch"
            rows = int(batch.loss_mask_BS.sum()) // 3
            assert batch.num_tokens == 3 * rows
            counted += [tuple(row[:2].tolist()) for row in batch.tokens_BS[:rows]]
    assert len(num_batches) == 1, "collectives would hang"
    expected = []
    for number, count in enumerate(counts):
        expected += [(number, index) for index in range(count)]
    assert sorted(counted) == expected


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_growing_batches_have_the_same_samples_in_every_layout(
    micro_batch_size: int,
) -> None:
    rampup = RampupConfig(start=4, increment=4, samples=20)
    for consumed, size in ((0, 4), (4, 4), (8, 8), (16, 12), (28, 16), (44, 16)):
        for dp in (1, 2):
            ids = []
            for dp_rank in range(dp):
                loader = StepLoader(
                    Numbered(0), micro_batch_size, 16, dp_rank, dp, BatchMaker(CPU), rampup
                )
                assert loader.num_microbatches(consumed) == size // dp // micro_batch_size
                for batch in loader.step(consumed):
                    ids += batch.tokens_BS[:, 1].tolist()
            assert sorted(ids) == list(range(consumed, consumed + size))


def test_documents_are_separated_where_they_begin_and_after_end_tokens() -> None:
    batch = BatchMaker(CPU, end_of_document=END).load(Numbered(END), [1])
    assert batch.position_ids.tolist() == [[0, 0, 1]]
    assert batch.loss_mask_BS.tolist() == [[0, 1, 0]]
    together = BatchMaker(CPU).load(Numbered(END), [1])
    assert together.position_ids.tolist() == [[0, 1, 2]]
    assert together.num_tokens == 3


def test_a_document_that_begins_with_the_end_token_is_one_document() -> None:
    rows = np.array([[END, 7, END, 1, 2, END, END, 3]])
    # The second and the last but one begin documents; the others end them.
    starts = np.array([[True, False, True, False, False, False, True, False]])
    batch = BatchMaker(CPU, end_of_document=END)(rows, None, starts)
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2, 3, 0]]
    assert batch.loss_mask_BS.tolist() == [[0, 0, 1, 1, 1, 0, 1]]


@pytest.fixture
def corpora(tmp_path: Path) -> list[PreparedCorpus]:
    made = []
    for number, weight in enumerate((3.0, 1.0, 0.001)):
        documents = [[[100 * number + place for place in range(50)]]]
        prefix = str(write_prepared(tmp_path / f"c{number}", documents))
        made.append(
            PreparedCorpus(
                prefix=prefix,
                weight=weight,
                num_tokens=50,
                num_documents=1,
                name=f"name{number}",
            )
        )
    return made


def test_the_samples_of_an_evaluation_are_those_of_the_blend(
    corpora: list[PreparedCorpus], tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    by_source = evaluation_sources(corpora, 3, 4, 1, cache)
    assert [source.name for source in by_source] == ["name0", "name1", "name2"]
    assert [source.in_blend for source in by_source] == [True, True, False]
    # The last one's weight is too small for a sample of the blend.
    assert [source.num_samples for source in by_source] == [2, 1, 1]
    blend = build_dataset(corpora, 3, 4, 1, cache)
    blended = sorted(blend[index].tolist() for index in range(3))
    separate = []
    for source in by_source[:2]:
        for index in range(source.num_samples):
            separate.append(source.dataset[index].tolist())
    assert sorted(separate) == blended
    alone = evaluation_sources(corpora[:1], 9, 4, 1, cache)
    same = build_dataset(corpora[:1], 9, 4, 1, cache)
    assert [alone[0].dataset[index].tolist() for index in range(9)] == [
        same[index].tolist() for index in range(9)
    ]


def test_sources_of_an_earlier_manifest_are_numbered(
    corpora: list[PreparedCorpus],
) -> None:
    unnamed = [corpus.model_copy(update={"name": ""}) for corpus in corpora]
    names = [source.name for source in evaluation_sources(unnamed, 20, 4, 1)]
    assert names == ["source-1", "source-2", "source-3"]


def test_a_blend_without_shuffling_takes_each_corpus_in_its_order(
    corpora: list[PreparedCorpus], tmp_path: Path
) -> None:
    blend = build_dataset(corpora[:2], 40, 4, 1, str(tmp_path / "cache"), shuffle=False)
    for number, count in ((0, 30), (1, 10)):
        firsts = []
        for index in range(40):
            first = int(blend[index][0])
            if first // 100 == number:
                firsts.append(first)
        order = [100 * number + 4 * place % 50 for place in range(count)]
        assert firsts == order


def test_steps_are_the_same_in_any_order() -> None:
    """A run that is rolled back takes other steps than those that were read ahead."""

    def loader() -> StepLoader:
        return StepLoader(Numbered(0), 2, 4, 0, 1, BatchMaker(CPU))

    taken = loader()
    for consumed in (0, 4, 8, 4, 4, 20, 0):
        expected = loader().step(consumed)
        for batch, other in zip(taken.step(consumed), expected, strict=True):
            assert torch.equal(batch.tokens_BS, other.tokens_BS)
            assert torch.equal(batch.labels_BS, other.labels_BS)
            assert batch.first_sample == other.first_sample
