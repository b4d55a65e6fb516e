"""Blends several datasets into one, by weight.

Owns: the dataset of each sample. Must not know: files, tokens, ranks.

Greedy as in Megatron: sample i is taken from the dataset that lags its share most,
argmax over d of weight_d * max(i, 1) - taken_d, with the lowest d on ties. So every
prefix of the blend has the configured proportions to within one sample per dataset.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ray.data.index_cache import Arrays, cache_key, load_or_build

IntArray = npt.NDArray[Any]

_SURPLUS = 0.005
_MAX_DATASETS = 32767  # dataset numbers are int16


class SampleDataset(Protocol):
    """Samples by index, in an order that is fixed on construction."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Returns [seq_length + 1] token ids."""
        ...

    def document_starts(self, index: int) -> npt.NDArray[np.bool_]:
        """Returns [seq_length + 1], which tokens of the sample begin a document."""
        ...


def normalized(weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Returns the weights scaled to add up to one.

    Raises ValueError when one is not positive or there are too many.
    """
    if not weights or len(weights) > _MAX_DATASETS:
        raise ValueError(f"a blend has 1 to {_MAX_DATASETS} datasets, not {len(weights)}")
    if min(weights) <= 0:
        raise ValueError(f"weights are positive, not {min(weights)}")
    values = np.array(weights, np.float64)
    shares: npt.NDArray[np.float64] = values / values.sum()
    return shares


def samples_needed(weights: Sequence[float], size: int) -> list[int]:
    """Returns the number of samples of each dataset for a blend of `size`.

    Its share, rounded up, plus half a percent, because the greedy order may exceed the
    share.
    """
    counts = []
    for share in normalized(weights).tolist():
        counts.append(math.ceil(math.ceil(size * share) * (1 + _SURPLUS)))
    return counts


def build_blend_indices(weights: Sequence[float], size: int) -> Arrays:
    """Returns dataset_index [size] int16 and dataset_sample_index [size] int64.

    Takes about 0.1 us per sample and dataset, so callers cache the result.
    """
    shares: list[float] = normalized(weights).tolist()
    taken = [0] * len(shares)
    dataset_index = np.empty(size, np.int16)
    sample_index = np.empty(size, np.int64)
    other_datasets = range(1, len(shares))
    # Python floats and lists: numpy would cost a call for each of the few datasets.
    for index in range(size):
        # At least 1, because otherwise all lags of the first sample would be zero.
        scale = max(float(index), 1.0)
        best = 0
        largest_lag = shares[0] * scale - taken[0]
        for dataset in other_datasets:
            lag = shares[dataset] * scale - taken[dataset]
            # Not >=, so that the lowest dataset wins ties, as in Megatron.
            if lag > largest_lag:
                best = dataset
                largest_lag = lag
        dataset_index[index] = best
        sample_index[index] = taken[best]
        taken[best] += 1
    return {"dataset_index": dataset_index, "dataset_sample_index": sample_index}


class BlendedDataset:
    """A blend of `size` samples of several datasets in proportion to their weights."""

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        weights: Sequence[float],
        size: int,
        cache_dir: str | None = None,
    ) -> None:
        """Builds the order or maps it from `cache_dir`.

        Raises ValueError when a dataset is too short for its share.
        """
        if len(datasets) != len(weights):
            raise ValueError(f"{len(datasets)} datasets with {len(weights)} weights")
        self._datasets = list(datasets)
        # Keyed by normalized weights, because 1:2 and 2:4 are the same blend.
        key = cache_key(
            {"format": 1, "weights": normalized(weights).tolist(), "size": size}
        )
        arrays = load_or_build(cache_dir, key, lambda: build_blend_indices(weights, size))
        self.dataset_index = arrays["dataset_index"]
        self.dataset_sample_index = arrays["dataset_sample_index"]
        # Checked now, not when training reaches the missing sample.
        self._require_enough_samples()

    def _require_enough_samples(self) -> None:
        counts = np.bincount(self.dataset_index, minlength=len(self._datasets))
        for number, dataset in enumerate(self._datasets):
            count = int(counts[number])
            if count > len(dataset):
                raise ValueError(
                    f"the blend takes {count} samples of dataset {number}, which has "
                    f"{len(dataset)}"
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Returns sample `index` as [seq_length + 1] token ids. Raises IndexError."""
        dataset, sample = self._locate(index)
        return dataset[sample]

    def document_starts(self, index: int) -> npt.NDArray[np.bool_]:
        """Returns [seq_length + 1], which tokens of sample `index` begin a document.

        Raises IndexError.
        """
        dataset, sample = self._locate(index)
        return dataset.document_starts(sample)

    def _locate(self, index: int) -> tuple[SampleDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        dataset = self._datasets[int(self.dataset_index[index])]
        return dataset, int(self.dataset_sample_index[index])
