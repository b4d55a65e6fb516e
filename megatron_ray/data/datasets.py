"""Builds one dataset from prepared corpora.

Owns: combining indices and blend. Must not know: how corpora were prepared, ranks.
"""

from collections.abc import Sequence

from megatron_ray.data.blend import BlendedDataset, SampleDataset, samples_needed
from megatron_ray.data.gpt_dataset import GPTDataset
from megatron_ray.data.indexed import IndexedDataset
from megatron_ray.data.lengthened import build_lengthened
from megatron_ray.data.prepared import PreparedCorpus


def build_dataset(
    corpora: Sequence[PreparedCorpus],
    num_samples: int,
    seq_length: int,
    seed: int,
    cache: str | None = None,
    earlier: Sequence[int] = (),
) -> SampleDataset:
    """Returns a dataset of at least `num_samples` samples of [seq_length + 1] tokens.

    `cache` is the folder of prepared data; indices are written below it. All ranks may
    call this at the same time. The order depends on num_samples too, as in Megatron, so
    a resumed run must pass the same number. A run that is lengthened passes in
    `earlier` the smaller numbers that it had before, and its order continues. Raises
    ValueError or OSError when a corpus cannot be read.
    """
    index_folder = None
    if cache is not None:
        index_folder = f"{cache.rstrip('/')}/indices"
    planned = [*earlier, num_samples]
    if len(corpora) == 1:
        # No blend of a single dataset, which would need an order and surplus samples.
        return _ordered(corpora[0], planned, seq_length, seed, index_folder)
    weights = [corpus.weight for corpus in corpora]
    sizes = [samples_needed(weights, size) for size in planned]
    datasets = []
    for number, corpus in enumerate(corpora):
        own_sizes = [row[number] for row in sizes]
        datasets.append(_ordered(corpus, own_sizes, seq_length, seed, index_folder))
    return BlendedDataset(datasets, weights, num_samples, index_folder)


def _ordered(
    corpus: PreparedCorpus,
    sizes: Sequence[int],
    seq_length: int,
    seed: int,
    index_folder: str | None,
) -> SampleDataset:
    tokens = IndexedDataset(corpus.prefix)

    def build_part(number: int, size: int) -> SampleDataset:
        # Another seed, because the same one would repeat the order.
        return GPTDataset(tokens, size, seq_length, seed + number, index_folder)

    return build_lengthened(sizes, build_part)
