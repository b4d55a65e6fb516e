"""Builds datasets from prepared corpora.

Owns: combining indices and blend, the samples of an evaluation. Must not know: how
corpora were prepared, ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ray.data.blend import (
    BlendedDataset,
    SampleDataset,
    build_blend_indices,
    samples_needed,
)
from megatron_ray.data.gpt_dataset import GPTDataset
from megatron_ray.data.indexed import IndexedDataset
from megatron_ray.data.lengthened import build_lengthened
from megatron_ray.data.prepared import PreparedCorpus


@dataclass(frozen=True)
class EvaluationSource:
    """The samples that an evaluation takes from one corpus."""

    name: str
    dataset: SampleDataset
    num_samples: int
    """The first samples of the dataset."""
    in_blend: bool = True
    """Whether they count in the loss of the blend, besides that of the source."""


def build_dataset(
    corpora: Sequence[PreparedCorpus],
    num_samples: int,
    seq_length: int,
    seed: int,
    cache: str | None = None,
    *,
    shuffle: bool = True,
    earlier: Sequence[int] = (),
) -> SampleDataset:
    """Returns a dataset of at least `num_samples` samples of [seq_length + 1] tokens.

    `cache` is the folder of prepared data; indices are written below it. All ranks may
    call this at the same time. The order depends on num_samples too, as in Megatron, so
    a resumed run must pass the same number; without `shuffle` it does not. A run that
    is lengthened passes in `earlier` the smaller numbers that it had before, and its
    order continues. Raises ValueError or OSError when a corpus cannot be read.
    """
    index_folder = _index_folder(cache)
    planned = [num_samples]
    if shuffle:
        planned = [*earlier, num_samples]

    def ordered(corpus: PreparedCorpus, sizes: Sequence[int]) -> SampleDataset:
        tokens = IndexedDataset(corpus.prefix)

        def build_part(number: int, size: int) -> SampleDataset:
            # Another seed, because the same one would repeat the order.
            return GPTDataset(
                tokens, size, seq_length, seed + number, index_folder, shuffle=shuffle
            )

        return build_lengthened(sizes, build_part)

    if len(corpora) == 1:
        # No blend of a single dataset, which would need an order and surplus samples.
        return ordered(corpora[0], planned)
    weights = [corpus.weight for corpus in corpora]
    sizes = [samples_needed(weights, size) for size in planned]
    datasets = []
    for number, corpus in enumerate(corpora):
        datasets.append(ordered(corpus, [row[number] for row in sizes]))
    return BlendedDataset(datasets, weights, num_samples, index_folder)


def evaluation_sources(
    corpora: Sequence[PreparedCorpus],
    num_samples: int,
    seq_length: int,
    seed: int,
    cache: str | None = None,
) -> list[EvaluationSource]:
    """Returns the first `num_samples` samples of the blend by corpus.

    A corpus whose weight is too small for a sample gets one that does not count in the
    blend. Raises ValueError or OSError when a corpus cannot be read.
    """
    weights = [corpus.weight for corpus in corpora]
    dataset_index = build_blend_indices(weights, num_samples)["dataset_index"]
    # A blend takes the samples of each dataset from the first one on.
    counts = np.bincount(dataset_index, minlength=len(corpora)).tolist()
    sizes = [num_samples]
    if len(corpora) > 1:
        sizes = samples_needed(weights, num_samples)
    sources: list[EvaluationSource] = []
    for corpus, count, size in zip(corpora, counts, sizes, strict=True):
        tokens = IndexedDataset(corpus.prefix)
        dataset = GPTDataset(tokens, size, seq_length, seed, _index_folder(cache))
        # Earlier manifests have no names.
        name = corpus.name or f"source-{len(sources) + 1}"
        sources.append(EvaluationSource(name, dataset, max(count, 1), count > 0))
    return sources


def _index_folder(cache: str | None) -> str | None:
    if cache is None:
        return None
    return f"{cache.rstrip('/')}/indices"
