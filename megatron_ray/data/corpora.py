"""One source as token files.

Owns: tokenizing, holding documents out, counting. Must not know: caches, blends,
seq_length.

Text is tokenized once, into `tokens`; `train` and `validation` are indices of their own
over the same tokens, so a split copies nothing (where the disk has links). Held out are
the documents with the smallest content hashes: the choice depends on nothing else, and
equal documents stay on one side. A corpus of a single document is cut in two near its
end.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ray.data.indexed import (
    IndexedDataset,
    IndexedDatasetBuilder,
    IndexTable,
    token_dtype,
    write_index,
)
from megatron_ray.data.sources import DataError, FoundSource, Piece, pieces
from megatron_ray.data.tokenizer import Tokenizer

Progress = Callable[[str], None]
IntArray = npt.NDArray[Any]

COUNTS = "counts.npy"
_BATCH_CHARS = 1 << 22
_BATCH_PIECES = 1024
_COUNT_TOKENS = 1 << 20
_SAY_EVERY_S = 2.0


def make_corpus(
    work: Path,
    found: FoundSource,
    tokenizer: Tokenizer,
    held_out: float | None,
    link: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Fills `work` and describes it: {"train": part | None, "validation": part | None},
    part = {prefix, num_tokens, num_documents}.

    `held_out` is the share of documents for validation; None means that all of it is
    for validation. A part's prefix is a name in `work`, or the source's own prefix.
    Raises DataError, OSError.
    """
    if found.kind == "prepared":
        corpus, hashes = _open_prepared(found, tokenizer.vocab_size, progress)
    else:
        hashes = _tokenize(found, tokenizer, work / "tokens", progress)
        corpus = IndexedDataset(str(work / "tokens"))
    whole = _describe(corpus.prefix if found.kind == "prepared" else "tokens", corpus)
    if held_out is None:
        np.save(work / COUNTS, _counts(corpus, tokenizer.vocab_size))
        return {"train": None, "validation": whole}
    if held_out == 0:
        return {"train": whole, "validation": None}
    parts = {}
    link = link and (found.kind != "prepared" or found.root.is_local)
    target = found.root.path + ".bin" if found.kind == "prepared" else "tokens.bin"
    for name, table in zip(
        ("train", "validation"), split(corpus.table, hashes, held_out), strict=True
    ):
        parts[name] = _write_part(work, name, corpus, table, target if link else None)
    if found.kind != "prepared" and not link:
        (work / "tokens.bin").unlink()
        (work / "tokens.idx").unlink()
    np.save(
        work / COUNTS,
        _counts(IndexedDataset(str(work / "validation")), tokenizer.vocab_size),
    )
    return parts


def split(
    table: IndexTable, hashes: npt.NDArray[np.uint64], fraction: float
) -> tuple[IndexTable, IndexTable]:
    """Train and validation by document: the `fraction` with the smallest hashes is held
    out, at least one document.
    """
    if len(hashes) < 2:
        return _cut(table, round(int(table.lengths.sum(dtype=np.int64)) * (1 - fraction)))
    count = max(1, round(fraction * len(hashes)))
    held = hashes <= np.partition(hashes, count - 1)[count - 1]
    return _select(table, ~held), _select(table, held)


def _select(table: IndexTable, documents: npt.NDArray[np.bool_]) -> IndexTable:
    sizes = np.diff(table.documents)
    sequences = np.repeat(documents, sizes)
    starts = np.concatenate([[0], np.cumsum(sizes[documents])]).astype(np.int64)
    return IndexTable(
        table.dtype, table.lengths[sequences], table.pointers[sequences], starts
    )


def _cut(table: IndexTable, tokens: int) -> tuple[IndexTable, IndexTable]:
    """The first `tokens` tokens of a single document, and the rest."""
    ends = np.cumsum(table.lengths, dtype=np.int64)
    at = int(np.searchsorted(ends, tokens, side="right"))
    if at == len(ends):
        return table, IndexTable(
            table.dtype, table.lengths[:0], table.pointers[:0], np.zeros(1, np.int64)
        )
    inside = tokens - (int(ends[at - 1]) if at else 0)
    head = table.lengths[: at + 1].copy()
    tail = table.lengths[at:].copy()
    head[-1] = inside
    tail[0] = table.lengths[at] - inside
    pointers = table.pointers[at:].copy()
    pointers[0] += inside * table.dtype.itemsize
    one = np.array([0, len(head)], np.int64), np.array([0, len(tail)], np.int64)
    return IndexTable(table.dtype, head, table.pointers[: at + 1], one[0]), IndexTable(
        table.dtype, tail, pointers, one[1]
    )


def _write_part(
    work: Path, name: str, corpus: IndexedDataset, table: IndexTable, target: str | None
) -> dict[str, Any]:
    binary = work / f"{name}.bin"
    if target is not None and _linked(binary, target):
        write_index(work / f"{name}.idx", table)
    else:
        view = corpus.view(table)
        with IndexedDatasetBuilder(work / name, table.dtype) as builder:
            for first, last in zip(
                table.documents[:-1].tolist(), table.documents[1:].tolist(), strict=True
            ):
                for sequence in range(first, last):
                    builder.add(view[sequence])
                    builder.end_sequence()
                builder.end_document()
    return _describe(name, IndexedDataset(str(work / name)))


def _linked(path: Path, target: str) -> bool:
    """False where the disk has no symbolic links (some network file systems)."""
    try:
        path.symlink_to(target)
    except OSError:
        return False
    return True


def _describe(prefix: str, corpus: IndexedDataset) -> dict[str, Any]:
    return {
        "prefix": prefix,
        "num_tokens": corpus.num_tokens,
        "num_documents": corpus.num_documents,
    }


def _tokenize(
    found: FoundSource, tokenizer: Tokenizer, prefix: Path, progress: Progress
) -> npt.NDArray[np.uint64]:
    """Writes all documents, each closed by the end token; gives their content hashes."""
    hashes: list[int] = []
    digest = hashlib.blake2b(digest_size=8)
    tokens = 0
    said = time.monotonic()
    progress(f"tokenizing {found.source.path} ({found.size / 1e6:.1f} MB)")
    with IndexedDatasetBuilder(prefix, token_dtype(tokenizer.vocab_size)) as builder:
        for batch in _batches(pieces(found)):
            for piece, ids in zip(
                batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True
            ):
                digest.update(piece.text.encode("utf-8", "replace"))
                builder.add(ids)
                tokens += len(ids)
                if piece.ends_document:
                    builder.add([tokenizer.end_of_document])
                    builder.end_document()
                    hashes.append(int.from_bytes(digest.digest(), "little"))
                    digest = hashlib.blake2b(digest_size=8)
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                progress(
                    f"tokenizing {found.source.path}: {len(hashes)} documents, "
                    f"{tokens / 1e6:.1f} million tokens"
                )
    if not hashes:
        raise DataError(
            "empty", f"{found.source.path} holds no text; give files with text in them"
        )
    progress(
        f"tokenized {found.source.path}: {len(hashes)} documents, {tokens / 1e6:.2f} million tokens"
    )
    return np.array(hashes, np.uint64)


def _batches(stream: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    chars = 0
    for piece in stream:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch = []
            chars = 0
    if batch:
        yield batch


def _open_prepared(
    found: FoundSource, vocab_size: int, progress: Progress
) -> tuple[IndexedDataset, npt.NDArray[np.uint64]]:
    """Reads every token once, so that a token outside the vocabulary is found now and
    not in the middle of training.
    """
    name = found.source.path
    progress(f"checking the tokens of {name} ({found.size / 1e6:.1f} MB)")
    try:
        corpus = IndexedDataset(_prefix(found))
    except ValueError as error:
        raise DataError("bad_corpus", f"{error}; prepare the data again") from error
    if not np.issubdtype(corpus.table.dtype, np.integer):
        raise DataError(
            "bad_corpus", f"{name} holds {corpus.table.dtype} values, not tokens"
        )
    hashes = []
    for first, last in zip(
        corpus.table.documents[:-1].tolist(),
        corpus.table.documents[1:].tolist(),
        strict=True,
    ):
        digest = hashlib.blake2b(digest_size=8)
        for sequence in range(first, last):
            tokens = corpus[sequence]
            if tokens.size and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
                wrong = (
                    int(tokens.max())
                    if int(tokens.max()) >= vocab_size
                    else int(tokens.min())
                )
                text = (
                    f"{name} holds token {wrong}, but the tokenizer has {vocab_size} tokens; "
                    "give the tokenizer the data were made with"
                )
                raise DataError("vocab_mismatch", text)
            digest.update(np.ascontiguousarray(tokens).data)
        hashes.append(int.from_bytes(digest.digest(), "little"))
    if not corpus.num_tokens:
        raise DataError("empty", f"{name} holds no tokens; prepare the data again")
    return corpus, np.array(hashes, np.uint64)


def _prefix(found: FoundSource) -> str:
    """Of prepared data, without .bin or .idx; a URI when the source is one."""
    return (
        found.root.path
        if found.root.is_local
        else found.source.path.removesuffix(".bin").removesuffix(".idx")
    )


def _counts(corpus: IndexedDataset, vocab_size: int) -> IntArray:
    """[vocab_size] how often each token occurs."""
    counts = np.zeros(vocab_size, np.int64)
    waiting: list[IntArray] = []
    size = 0
    for sequence in range(len(corpus)):
        waiting.append(corpus[sequence])
        size += len(waiting[-1])
        # Not one by one: each bincount costs a pass over the vocabulary.
        if size >= _COUNT_TOKENS or sequence + 1 == len(corpus):
            counts += np.bincount(np.concatenate(waiting), minlength=vocab_size)
            waiting = []
            size = 0
    return counts
