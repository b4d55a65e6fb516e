"""From prepared corpora to one dataset.

Owns: putting indices and blend together. Must not know: how corpora were made, ranks.
"""

from collections.abc import Sequence

from megatron_ray.data.blend import BlendedDataset, SampleDataset, samples_needed
from megatron_ray.data.gpt_dataset import GPTDataset
from megatron_ray.data.indexed import IndexedDataset
from megatron_ray.data.prepared import PreparedCorpus


def build_dataset(
    corpora: Sequence[PreparedCorpus],
    num_samples: int,
    seq_length: int,
    seed: int,
    cache: str | None = None,
) -> SampleDataset:
    """A dataset of at least `num_samples` samples of [seq_length + 1] tokens.

    `cache` is the folder of prepared data; indices go below it. Every rank may call
    this at once. The order depends on num_samples too, as in Megatron: a run that
    resumes must ask for the same number. Raises ValueError or OSError when a corpus
    cannot be read.
    """
    folder = None if cache is None else f"{cache.rstrip('/')}/indices"
    weights = [corpus.weight for corpus in corpora]
    if len(corpora) == 1:
        return GPTDataset(
            IndexedDataset(corpora[0].prefix), num_samples, seq_length, seed, folder
        )
    datasets = [
        GPTDataset(IndexedDataset(corpus.prefix), needed, seq_length, seed, folder)
        for corpus, needed in zip(
            corpora, samples_needed(weights, num_samples), strict=True
        )
    ]
    return BlendedDataset(datasets, weights, num_samples, folder)
