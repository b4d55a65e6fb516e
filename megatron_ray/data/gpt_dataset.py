"""Serves fixed-length samples from a corpus, in Megatron's order.

Owns: the three indices. Must not know: blends, ranks, tokenizers.

Sequences of all epochs are concatenated in the order of the document index. Sample j is
the seq_length + 1 tokens from token j * seq_length of that stream (neighbours share one
token: the last label is the next first input). The shuffle index maps position i to j.
If less than 80% of the last epoch is needed, it is shuffled separately, so that it does
not thin out the epochs before it. The order is a function of (sequence lengths,
num_samples, seq_length, seed) alone. Equal to megatron-core's GPTDataset. Without
shuffling both indices count upwards, so samples are in the order of the corpus.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ray.data.index_cache import Arrays, cache_key, load_or_build
from megatron_ray.data.indexed import IndexedDataset

IntArray = npt.NDArray[Any]

_LAST_EPOCH_THRESHOLD = 0.80
_CHUNK = 1 << 20


@dataclass(frozen=True)
class EpochPlan:
    """The number of passes over a corpus for a number of samples."""

    epochs: int
    samples_before_last: int
    """Samples in all epochs before the last."""
    separate_last: bool
    """Whether the last epoch is shuffled separately."""


def plan_epochs(tokens_per_epoch: int, num_samples: int, seq_length: int) -> EpochPlan:
    """Returns the fewest epochs with `num_samples` samples and the one extra token.

    Raises ValueError when there are no tokens.
    """
    if tokens_per_epoch < 1:
        raise ValueError("the corpus has no tokens")
    # The extra token is the last label. Ceiling division.
    epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    before_last = max(0, (epochs - 1) * tokens_per_epoch - 1) // seq_length
    from_last = num_samples - before_last
    # Samples in a single epoch.
    per_epoch = (tokens_per_epoch - 1) // seq_length
    separate_last = epochs > 1 and from_last < int(_LAST_EPOCH_THRESHOLD * per_epoch)
    return EpochPlan(epochs, before_last, separate_last)


def build_document_index(
    num_sequences: int, plan: EpochPlan, random: np.random.RandomState
) -> IntArray:
    """Returns [epochs * num_sequences] int32: sequence ids in the order of the stream."""
    sequences = np.arange(num_sequences, dtype=np.int32)
    shuffles = [plan.epochs]
    if plan.separate_last:
        shuffles = [plan.epochs - 1, 1]
    shuffled = []
    # All epochs of a part are shuffled together, as in Megatron, so a document may occur
    # twice before another occurs once.
    for epochs in shuffles:
        index = np.tile(sequences, epochs)
        random.shuffle(index)
        shuffled.append(index)
    return np.concatenate(shuffled)


def build_sample_index(
    lengths: IntArray, document_index: IntArray, num_samples: int, seq_length: int
) -> IntArray:
    """Returns [num_samples + 1, 2], where samples start in the document index.

    Row j is (position in the document index, token offset) where sample j starts and j
    - 1 ends, the location of token j * seq_length of the stream. It is found by a
    binary search in the running sum of lengths, in chunks, so that the only large
    arrays are the sum (8 bytes per entry of the document index) and the result.
    """
    # Running length of the stream in 64 bits, since it covers all epochs.
    ends = np.cumsum(lengths[document_index], dtype=np.int64)
    largest = max(len(document_index), int(lengths.max(initial=0)))
    dtype: type[np.generic] = np.int32
    if largest > np.iinfo(np.int32).max:
        dtype = np.int64
    index = np.zeros((num_samples + 1, 2), dtype)
    # Row 0 stays (0, 0), also when the first sequences are empty, as in Megatron.
    for start in range(1, num_samples + 1, _CHUNK):
        stop = min(start + _CHUNK, num_samples + 1)
        tokens = np.arange(start, stop, dtype=np.int64) * seq_length
        # side="right": an offset equal to the end of one sequence is the first token of the
        # next, and empty sequences in between are skipped.
        position = np.searchsorted(ends, tokens, side="right")
        begins = np.where(position > 0, ends[position - 1], 0)
        index[start:stop, 0] = position
        index[start:stop, 1] = tokens - begins
    return index


def build_shuffle_index(
    num_samples: int, total: int, random: np.random.RandomState
) -> IntArray:
    """Returns [total]: a permutation of the first `num_samples`, then one of the rest."""
    dtype = _shuffle_dtype(total)
    head = np.arange(num_samples, dtype=dtype)
    random.shuffle(head)
    if num_samples == total:
        return head
    tail = np.arange(num_samples, total, dtype=dtype)
    random.shuffle(tail)
    return np.concatenate([head, tail])


def _shuffle_dtype(total: int) -> type[np.generic]:
    # Four bytes per sample while the numbers fit, as in Megatron.
    if total < np.iinfo(np.uint32).max - 1:
        return np.uint32
    return np.int64


def build_indices(
    lengths: IntArray, num_samples: int, seq_length: int, seed: int, *, shuffle: bool = True
) -> Arrays:
    """Returns document_index, sample_index and shuffle_index.

    Raises ValueError when there are no tokens.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    plan = plan_epochs(tokens, num_samples, seq_length)
    total = (plan.epochs * tokens - 1) // seq_length
    random = np.random.RandomState(seed)
    # In Megatron's order: both shuffles draw from one generator.
    if shuffle:
        documents = build_document_index(len(lengths), plan, random)
    else:
        documents = np.tile(np.arange(len(lengths), dtype=np.int32), plan.epochs)
    samples = build_sample_index(lengths, documents, total, seq_length)
    shuffled_together = total
    if plan.separate_last:
        shuffled_together = plan.samples_before_last
    if shuffle:
        order = build_shuffle_index(shuffled_together, total, random)
    else:
        order = np.arange(total, dtype=_shuffle_dtype(total))
    return {"document_index": documents, "sample_index": samples, "shuffle_index": order}


class GPTDataset:
    """A dataset of at least `num_samples` samples of one corpus."""

    def __init__(
        self,
        corpus: IndexedDataset,
        num_samples: int,
        seq_length: int,
        seed: int,
        cache_dir: str | None = None,
        *,
        shuffle: bool = True,
    ) -> None:
        """Builds the indices or maps them from `cache_dir`.

        Without `shuffle` samples are in the order of the corpus. Raises ValueError when
        there are no tokens, OSError from the disk.
        """
        self._corpus = corpus
        self._seq_length = seq_length
        # Exactly the values that determine the order, see the module's docstring.
        lengths = np.ascontiguousarray(corpus.lengths)
        fields: dict[str, object] = {
            "format": 1,
            "lengths": hashlib.sha256(lengths.data).hexdigest(),
            "num_samples": num_samples,
            "seq_length": seq_length,
            "seed": seed,
        }
        if not shuffle:
            # Only then, so that earlier indices keep their names.
            fields["shuffle"] = False
        arrays = load_or_build(
            cache_dir,
            cache_key(fields),
            lambda: build_indices(
                corpus.lengths, num_samples, seq_length, seed, shuffle=shuffle
            ),
        )
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Returns sample `index` as [seq_length + 1] token ids.

        Inputs are all but the last token, labels all but the first. Raises IndexError.
        """
        tokens = np.empty(self._seq_length + 1, np.int64)
        filled = 0
        for sequence, offset, count in self._pieces(index):
            tokens[filled : filled + count] = self._corpus.get(sequence, offset, count)
            filled += count
        return tokens

    def document_starts(self, index: int) -> npt.NDArray[np.bool_]:
        """Returns [seq_length + 1], which tokens of sample `index` begin a document.

        The first token always does. Raises IndexError.
        """
        starts = np.zeros(self._seq_length + 1, np.bool_)
        filled = 0
        previous = -1
        is_new = True
        for sequence, _, count in self._pieces(index):
            # Only the next sequence of the same document continues it. Sequences may be
            # empty, and then the one after them begins the document.
            if sequence != previous + 1 or self._corpus.begins_document(sequence):
                is_new = True
            previous = sequence
            if count:
                starts[filled] = is_new
                is_new = False
            filled += count
        return starts

    def _pieces(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Yields sequence, offset and number of tokens of each part of sample `index`.

        Raises IndexError.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = int(self.shuffle_index[index])
        position, offset = self._start_of(sample)
        last_position, last_offset = self._start_of(sample + 1)
        # A sample may span many short sequences.
        while position <= last_position:
            sequence = int(self.document_index[position])
            end = int(self._corpus.lengths[sequence])
            if position == last_position:
                # One extra token for the last label.
                end = last_offset + 1
            yield sequence, offset, end - offset
            position += 1
            offset = 0

    def _start_of(self, sample: int) -> tuple[int, int]:
        position, offset = self.sample_index[sample]
        return int(position), int(offset)
