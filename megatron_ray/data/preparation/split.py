"""Splits a corpus into training and validation documents.

Owns: which documents are held out. Must not know: files.

A split makes two indices over the same tokens and copies nothing. The documents with
the smallest content hashes are held out: the choice depends on nothing else, and equal
documents are in the same part. A corpus of a single document is cut in two near its
end.
"""

import numpy as np
import numpy.typing as npt

from megatron_ray.data.indexed import IndexTable


def split_documents(
    table: IndexTable, hashes: npt.NDArray[np.uint64], held_out_fraction: float
) -> tuple[IndexTable, IndexTable]:
    """Returns the indices for training and for validation.

    `hashes` [documents] are content hashes. At least one document is held out.
    """
    if len(hashes) < 2:
        num_tokens = int(table.lengths.sum(dtype=np.int64))
        return _cut_document(table, round(num_tokens * (1 - held_out_fraction)))
    count = max(1, round(held_out_fraction * len(hashes)))
    # Documents with a hash equal to the threshold have the same text and are held out too.
    threshold = np.partition(hashes, count - 1)[count - 1]
    is_held_out = hashes <= threshold
    return _select(table, ~is_held_out), _select(table, is_held_out)


def _select(table: IndexTable, is_selected: npt.NDArray[np.bool_]) -> IndexTable:
    # All sequences of a document belong to the same part.
    sequences_per_document = np.diff(table.documents)
    sequences = np.repeat(is_selected, sequences_per_document)
    ends = np.cumsum(sequences_per_document[is_selected])
    starts = np.concatenate([[0], ends]).astype(np.int64)
    return IndexTable(
        table.dtype, table.lengths[sequences], table.pointers[sequences], starts
    )


def _cut_document(table: IndexTable, num_tokens: int) -> tuple[IndexTable, IndexTable]:
    """Cuts a single document after `num_tokens` tokens."""
    ends = np.cumsum(table.lengths, dtype=np.int64)
    cut = int(np.searchsorted(ends, num_tokens, side="right"))
    # The document is too short to hold out a token.
    if cut == len(ends):
        empty = IndexTable(
            table.dtype, table.lengths[:0], table.pointers[:0], np.zeros(1, np.int64)
        )
        return table, empty
    # Sequence `cut` is split: its first tokens are in the head, the rest in the tail.
    tokens_before = 0
    if cut:
        tokens_before = int(ends[cut - 1])
    inside = num_tokens - tokens_before
    head_lengths = table.lengths[: cut + 1].copy()
    head_lengths[-1] = inside
    tail_lengths = table.lengths[cut:].copy()
    tail_lengths[0] = table.lengths[cut] - inside
    tail_pointers = table.pointers[cut:].copy()
    tail_pointers[0] += inside * table.dtype.itemsize
    head = IndexTable(
        table.dtype, head_lengths, table.pointers[: cut + 1], _one_document(head_lengths)
    )
    tail = IndexTable(table.dtype, tail_lengths, tail_pointers, _one_document(tail_lengths))
    return head, tail


def _one_document(lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    return np.array([0, len(lengths)], np.int64)
