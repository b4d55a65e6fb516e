"""Splits a corpus into training and validation documents.

Owns: which documents are held out. Must not know: files.

A split makes two indices over the same tokens and copies nothing. The choice depends on
the documents' contents only: texts are held out in the order of their content hashes,
all copies of a text together, and a text is passed over when it would move the share of
documents or of tokens away from the one asked for. Where whole texts are far from it,
as one of two documents is, the end of a text is held out too, at the same place in each
of its copies.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ray.data.indexed import IndexTable

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]

# Distances from the share asked for, as parts of it or of the rest, whichever is smaller.
_NEAR = 0.2
_FAR = 0.5
_LEAST_TAIL = 16
"""Fewest tokens of the ends of a text's copies that are worth holding out."""


@dataclass(frozen=True)
class _Texts:
    """The different texts of a corpus, in the order of their content hashes."""

    copies: Int64Array
    """[texts]"""
    tokens: Int64Array
    """[texts], tokens of all copies."""
    text_of_document: Int64Array
    """[documents]"""


@dataclass(frozen=True)
class _Target:
    """What to hold out."""

    documents: int
    """Zero when any number of whole documents is far from the share."""
    tokens: float
    near: float
    """Tokens by which the result may differ and still is near."""
    far: float
    """Tokens from which on it is far."""
    texts: int
    """The most texts that may be held out, so that training keeps some."""


def split_documents(
    table: IndexTable, hashes: npt.NDArray[np.uint64], held_out_fraction: float
) -> tuple[IndexTable, IndexTable]:
    """Returns the indices for training and for validation.

    `hashes` [documents] are content hashes.
    """
    texts = _texts(table, hashes)
    target = _target(texts, held_out_fraction)
    is_text_held_out = _choose(texts, target)
    missing = target.tokens - int(texts.tokens[is_text_held_out].sum())
    is_held_out = is_text_held_out[texts.text_of_document]
    if missing > target.far or not is_held_out.any():
        table, is_held_out = _with_tails(table, texts, is_text_held_out, missing)
    return _select(table, ~is_held_out), _select(table, is_held_out)


def _with_tails(
    table: IndexTable, texts: _Texts, is_text_held_out: BoolArray, missing: float
) -> tuple[IndexTable, BoolArray]:
    """Returns an index with tails of `missing` tokens, and which documents are held out."""
    is_held_out = is_text_held_out[texts.text_of_document]
    # The text with the most tokens has the most room for what is missing.
    rest = np.where(is_text_held_out, 0, texts.tokens)
    text = int(rest.argmax())
    documents = np.flatnonzero(texts.text_of_document == text)
    head = round((int(rest[text]) - missing) / len(documents))
    tail = int(rest[text]) // len(documents) - head
    is_only_text = len(texts.copies) == 1
    is_worth_it = is_only_text or tail * len(documents) >= _LEAST_TAIL
    if head > 0 and tail > 0 and is_worth_it:
        # Each tail is a document of its own, after its head.
        return _cut_documents(table, documents, head), np.insert(
            is_held_out, documents + 1, True
        )
    if not is_only_text and not is_held_out.any():
        is_held_out = texts.text_of_document == int(texts.tokens.argmin())
    return table, is_held_out


def is_near_share(share: float, fraction: float) -> bool:
    """Whether a share of held-out tokens is as near to the one asked for as it should be."""
    return abs(share - fraction) <= _NEAR * min(fraction, 1 - fraction)


def _texts(table: IndexTable, hashes: npt.NDArray[np.uint64]) -> _Texts:
    ends = np.concatenate([[0], np.cumsum(table.lengths, dtype=np.int64)])
    tokens_of_document = np.diff(ends[table.documents])
    _, text_of_document, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    tokens = np.zeros(len(copies), np.int64)
    np.add.at(tokens, text_of_document, tokens_of_document)
    return _Texts(copies, tokens, text_of_document)


def _target(texts: _Texts, fraction: float) -> _Target:
    num_documents = int(texts.copies.sum())
    num_tokens = int(texts.tokens.sum())
    smaller = min(fraction, 1 - fraction)
    documents = round(fraction * num_documents)
    if abs(documents - fraction * num_documents) > _FAR * smaller * num_documents:
        documents = 0
    # Where one text is most of the corpus, the share may be more than all others.
    most_texts = round(max(fraction, 0.5) * len(texts.copies))
    return _Target(
        documents,
        fraction * num_tokens,
        _NEAR * smaller * num_tokens,
        _FAR * smaller * num_tokens,
        min(most_texts, len(texts.copies) - 1),
    )


def _choose(texts: _Texts, target: _Target) -> BoolArray:
    """Returns [texts], which texts are held out whole."""
    if not target.documents:
        return _choose_by_tokens(texts, target)
    is_held_out = np.zeros(len(texts.copies), np.bool_)
    # First those that keep the average length; where these are too few documents, as
    # beside one very long document, then others that fit.
    for keeps_average in (True, False):
        _add_texts(is_held_out, texts, target, keeps_average=keeps_average)
    return is_held_out


def _choose_by_tokens(texts: _Texts, target: _Target) -> BoolArray:
    """Returns texts that add up to the tokens, the largest first; there are few texts."""
    is_held_out = np.zeros(len(texts.copies), np.bool_)
    if target.texts == 0:
        return is_held_out
    missing = target.tokens
    for text in np.argsort(-texts.tokens, kind="stable").tolist():
        tokens = int(texts.tokens[text])
        # It must come nearer, and not far above.
        if tokens < 2 * missing and tokens <= missing + target.far:
            is_held_out[text] = True
            missing -= tokens
        if is_held_out.sum() == target.texts:
            break
    return is_held_out


def _add_texts(
    is_held_out: BoolArray, texts: _Texts, target: _Target, *, keeps_average: bool
) -> None:
    """Holds out further texts in their order, until there are enough documents."""
    num_documents = int(texts.copies[is_held_out].sum())
    num_tokens = int(texts.tokens[is_held_out].sum())
    num_texts = int(is_held_out.sum())
    tokens_per_document = int(texts.tokens.sum()) / int(texts.copies.sum())
    # Python numbers: numpy would cost a call for each text.
    tokens_of_texts = texts.tokens.tolist()
    for text, copies in enumerate(texts.copies.tolist()):
        if num_documents == target.documents or num_texts == target.texts:
            return
        new_documents = num_documents + copies
        new_tokens = num_tokens + tokens_of_texts[text]
        if is_held_out[text] or new_documents > target.documents:
            continue
        fits = new_tokens <= target.tokens + target.near
        if keeps_average:
            excess = num_tokens - num_documents * tokens_per_document
            new_excess = new_tokens - new_documents * tokens_per_document
            fits = abs(new_excess) <= max(target.near, abs(excess))
        if fits:
            is_held_out[text] = True
            num_documents = new_documents
            num_tokens = new_tokens
            num_texts += 1


def _select(table: IndexTable, is_selected: BoolArray) -> IndexTable:
    # All sequences of a document belong to the same part.
    sequences_per_document = np.diff(table.documents)
    sequences = np.repeat(is_selected, sequences_per_document)
    ends = np.cumsum(sequences_per_document[is_selected])
    starts = np.concatenate([[0], ends]).astype(np.int64)
    return IndexTable(
        table.dtype, table.lengths[sequences], table.pointers[sequences], starts
    )


def _cut_documents(table: IndexTable, documents: Int64Array, head: int) -> IndexTable:
    """Returns an index in which each of `documents` is two: `head` tokens, and the rest."""
    ends = np.cumsum(table.lengths, dtype=np.int64)
    begins = np.concatenate([[0], ends])
    # The sequence with the first token of each tail, and the tokens before it there.
    cuts = begins[table.documents[documents]] + head
    sequences = np.searchsorted(ends, cuts, side="right")
    inside = cuts - begins[sequences]
    # A tail that begins with a sequence splits none.
    split = sequences[inside > 0]
    inside = inside[inside > 0]
    lengths = np.array(table.lengths)
    tail_lengths = lengths[split] - inside
    lengths[split] = inside
    tail_pointers = table.pointers[split] + inside * table.dtype.itemsize
    # Marks move by the sequences that are inserted before them.
    marks = table.documents + np.searchsorted(split, table.documents)
    tail_marks = sequences + np.searchsorted(split, sequences, side="right")
    return IndexTable(
        table.dtype,
        np.insert(lengths, split + 1, tail_lengths),
        np.insert(table.pointers, split + 1, tail_pointers),
        np.insert(marks, documents + 1, tail_marks),
    )
