"""Builds the token files of one source.

Owns: tokenizing, checking prepared tokens, counting. Must not know: caches, blends,
seq_length.

Text is tokenized once, into `tokens`; `train` and `validation` are separate indices
over the same tokens, so a split copies nothing (if the disk supports links).
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
from megatron_ray.data.preparation.documents import new_tally, read_chunks
from megatron_ray.data.preparation.errors import DataError
from megatron_ray.data.preparation.formats.records import TextChunk
from megatron_ray.data.preparation.sources import SourceFiles
from megatron_ray.data.preparation.split import split_documents
from megatron_ray.data.tokenizer import Tokenizer

ProgressCallback = Callable[[str], None]
"""Receives short progress messages for users."""
IntArray = npt.NDArray[Any]
DocumentHashes = npt.NDArray[np.uint64]

COUNTS = "counts.npy"
RECORDS = "records.json"
"""Tally of the records of a source of text."""
_BATCH_CHARS = 1 << 22
_BATCH_CHUNKS = 1024
_COUNT_TOKENS = 1 << 20
_FIRST_TOKENS = 64
_HASH_BYTES = 8
_PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True)
class Borders:
    """What shows where the documents of prepared tokens begin and end."""

    num_documents: int
    """Documents of the index."""
    num_end_tokens: int
    """Tokens that are the tokenizer's end token."""
    last_token: int | None
    """The token that all documents end with; None when they end differently."""
    first_token: int | None = None
    """The token that all documents begin with; None when they begin differently."""

    @property
    def can_be_separated(self) -> bool:
        """Whether there is more than one document to be seen."""
        return self.num_documents > 1 or self.num_end_tokens > 0


def build_corpus(
    work: Path,
    source_files: SourceFiles,
    tokenizer: Tokenizer,
    vocab_size: int,
    held_out_fraction: float | None,
    use_links: bool,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Fills the folder `work` and describes it.

    Returns {"train": part | None, "validation": part | None, "borders": Borders | None},
    part = {prefix, num_tokens, num_documents, first_tokens}; a prefix is a name in `work`,
    or the source's own prefix; `borders` are those of prepared tokens, which must be below
    `vocab_size`. `held_out_fraction` is the share for validation; None means that all of
    it is for validation. Raises DataError, OSError.
    """
    # A prepared source is used in place; only new indices are written.
    is_prepared = source_files.kind == "prepared"
    prefix = "tokens"
    borders = None
    if is_prepared:
        corpus, hashes, borders = _open_prepared(
            source_files, tokenizer, vocab_size, progress
        )
        prefix = corpus.prefix
    else:
        hashes = _tokenize(source_files, tokenizer, work / prefix, progress)
        corpus = IndexedDataset(str(work / prefix))
    if held_out_fraction is None:
        np.save(work / COUNTS, _count_tokens(corpus, tokenizer.vocab_size))
        return _description(None, _describe(prefix, corpus), borders)
    if held_out_fraction == 0:
        return _description(_describe(prefix, corpus), None, borders)
    # Relative for tokens in the entry, so that the entry can be renamed and moved.
    link_target = None
    if use_links and not is_prepared:
        link_target = "tokens.bin"
    elif use_links and source_files.root.is_local:
        link_target = source_files.root.path + ".bin"
    train, validation = split_documents(corpus.table, hashes, held_out_fraction)
    train_part = _write_part(work, "train", corpus, train, link_target)
    validation_part = _write_part(work, "validation", corpus, validation, link_target)
    if link_target is None and not is_prepared:
        # Both parts have copies of their tokens. (With links, this file is the target.)
        (work / "tokens.bin").unlink()
        (work / "tokens.idx").unlink()
    # Counted for the unigram baseline while the tokens are in the page cache.
    held_out = IndexedDataset(str(work / "validation"))
    np.save(work / COUNTS, _count_tokens(held_out, tokenizer.vocab_size))
    return _description(train_part, validation_part, borders)


def _description(
    train: dict[str, Any] | None,
    validation: dict[str, Any] | None,
    borders: Borders | None,
) -> dict[str, Any]:
    return {
        "train": train,
        "validation": validation,
        "borders": borders and asdict(borders),
    }


def _write_part(
    work: Path,
    name: str,
    corpus: IndexedDataset,
    table: IndexTable,
    link_target: str | None,
) -> dict[str, Any]:
    tokens = work / f"{name}.bin"
    if link_target is not None and _try_link(tokens, link_target):
        write_index(work / f"{name}.idx", table)
    else:
        _copy_documents(corpus.view(table), work / name)
    return _describe(name, IndexedDataset(str(work / name)))


def _try_link(path: Path, target: str) -> bool:
    """Returns False if the disk has no symbolic links (some network filesystems)."""
    try:
        path.symlink_to(target)
    except OSError:
        return False
    return True


def _copy_documents(corpus: IndexedDataset, prefix: Path) -> None:
    with IndexedDatasetBuilder(prefix, corpus.table.dtype) as builder:
        for sequences in corpus.document_ranges():
            for sequence in sequences:
                builder.add(corpus[sequence])
                # The sequences of a document remain separate, as in the original.
                builder.end_sequence()
            builder.end_document()


def _describe(prefix: str, corpus: IndexedDataset) -> dict[str, Any]:
    return {
        "prefix": prefix,
        "num_tokens": corpus.num_tokens,
        "num_documents": corpus.num_documents,
        "first_tokens": _first_tokens(corpus),
    }


def _first_tokens(corpus: IndexedDataset) -> list[int]:
    """Returns the beginning of the first document, to be shown."""
    for sequences in corpus.document_ranges():
        tokens: list[int] = []
        for sequence in sequences:
            length = min(len(corpus[sequence]), _FIRST_TOKENS - len(tokens))
            tokens += corpus.get(sequence, length=length).tolist()
        return tokens
    return []


def _tokenize(
    source_files: SourceFiles,
    tokenizer: Tokenizer,
    prefix: Path,
    progress: ProgressCallback,
) -> DocumentHashes:
    """Writes all documents with the tokens around them; returns their content hashes."""
    name = source_files.source.path
    progress(f"tokenizing {name} ({source_files.num_bytes / 1e6:.1f} MB)")
    dtype = token_dtype(tokenizer.vocab_size)
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        writer = _TokenWriter(tokenizer, builder)
        tally = new_tally(source_files)
        reported_at = time.monotonic()
        # In batches, which the tokenizer processes on all cores.
        for batch in _batches(read_chunks(source_files, tally)):
            # The rest is only counted, so that one message covers all bad records.
            if tally.has_too_many_bad:
                continue
            writer.write(batch)
            if time.monotonic() - reported_at > _PROGRESS_EVERY_S:
                reported_at = time.monotonic()
                progress(
                    f"tokenizing {name}: {len(writer.hashes)} documents, "
                    f"{writer.num_tokens / 1e6:.1f} million tokens"
                )
    if not writer.hashes:
        raise DataError("empty", f"{name} holds no text; give files with text in them")
    prefix.with_name(RECORDS).write_text(json.dumps(tally.to_json()))
    noun = "documents"
    if len(writer.hashes) == 1:
        noun = "document"
    progress(
        f"tokenized {name}: {len(writer.hashes)} {noun}, "
        f"{writer.num_tokens / 1e6:.2f} million tokens"
    )
    return np.array(writer.hashes, np.uint64)


class _TokenWriter:
    """Tokenizes chunks into a corpus and hashes each document's text."""

    def __init__(self, tokenizer: Tokenizer, builder: IndexedDatasetBuilder) -> None:
        self._tokenizer = tokenizer
        self._builder = builder
        # Covers all chunks of the current document.
        self._digest = hashlib.blake2b(digest_size=_HASH_BYTES)
        self._last_token: int | None = None
        """Last token of the current document; None before its first one."""
        self.hashes: list[int] = []
        self.num_tokens = 0
        """Without the tokens around documents."""

    def write(self, batch: list[TextChunk]) -> None:
        """Appends a batch, which is tokenized on all cores."""
        ids_of_chunks = self._tokenizer.encode_batch([chunk.text for chunk in batch])
        for chunk, ids in zip(batch, ids_of_chunks, strict=True):
            # Hashes the text, because the split must not depend on the tokenizer.
            self._digest.update(chunk.text.encode("utf-8", "replace"))
            if self._last_token is None:
                self._begin_document(ids)
            self._add(ids)
            self.num_tokens += len(ids)
            if chunk.ends_document:
                self._end_document()

    def _begin_document(self, ids: Sequence[int]) -> None:
        begin = self._tokenizer.begin_of_document
        # Rendered chats may hold the token in their text.
        if begin is not None and begin not in ids[:1]:
            self._add([begin])

    def _end_document(self) -> None:
        end = self._tokenizer.end_of_document
        if self._last_token != end:
            self._add([end])
        self._builder.end_document()
        self.hashes.append(_as_int(self._digest.digest()))
        self._digest = hashlib.blake2b(digest_size=_HASH_BYTES)
        self._last_token = None

    def _add(self, ids: Sequence[int]) -> None:
        self._builder.add(ids)
        if ids:
            self._last_token = ids[-1]


def _as_int(digest: bytes) -> int:
    return int.from_bytes(digest, "little")


def _batches(chunks: Iterator[TextChunk]) -> Iterator[list[TextChunk]]:
    batch: list[TextChunk] = []
    num_chars = 0
    for chunk in chunks:
        batch.append(chunk)
        num_chars += len(chunk.text)
        if num_chars >= _BATCH_CHARS or len(batch) >= _BATCH_CHUNKS:
            yield batch
            batch = []
            num_chars = 0
    if batch:
        yield batch


def _open_prepared(
    source_files: SourceFiles,
    tokenizer: Tokenizer,
    vocab_size: int,
    progress: ProgressCallback,
) -> tuple[IndexedDataset, DocumentHashes, Borders]:
    """Opens a prepared corpus and reads every token once.

    Tokens outside the vocabulary are thus found now, not during training.
    """
    name = source_files.source.path
    progress(f"checking the tokens of {name} ({source_files.num_bytes / 1e6:.1f} MB)")
    try:
        corpus = IndexedDataset(_prefix_of(source_files))
    except ValueError as error:
        raise DataError("bad_corpus", f"{error}; prepare the data again") from error
    if not np.issubdtype(corpus.table.dtype, np.integer):
        detail = f"{name} holds {corpus.table.dtype} values, not tokens"
        raise DataError("bad_corpus", detail)
    if not corpus.num_tokens:
        raise DataError("empty", f"{name} holds no tokens; prepare the data again")
    if not _covers_sequences(corpus.table):
        detail = (
            f"the documents that the index of {name} marks are not its {len(corpus)} "
            "sequences; prepare the data again"
        )
        raise DataError("bad_corpus", detail)
    return corpus, *_read_documents(corpus, tokenizer, vocab_size, name)


def _covers_sequences(table: IndexTable) -> bool:
    """Whether lengths and positions are possible and each sequence is of one document."""
    marks = table.documents
    if len(marks) < 2 or marks[0] != 0 or marks[-1] != len(table.lengths):
        return False
    smallest = min(table.lengths.min(initial=0), table.pointers.min(initial=0))
    return bool(smallest >= 0 and (np.diff(marks) >= 0).all())


def _read_documents(
    corpus: IndexedDataset, tokenizer: Tokenizer, vocab_size: int, name: str
) -> tuple[DocumentHashes, Borders]:
    hashes = []
    num_end_tokens = 0
    first_tokens = set[int]()
    last_tokens = set[int]()
    for sequences in corpus.document_ranges():
        digest = hashlib.blake2b(digest_size=_HASH_BYTES)
        outer_tokens: list[int] = []
        for sequence in sequences:
            tokens = corpus[sequence]
            _check_tokens(tokens, vocab_size, name)
            digest.update(np.ascontiguousarray(tokens).data)
            num_end_tokens += int(np.count_nonzero(tokens == tokenizer.end_of_document))
            if tokens.size:
                outer_tokens += [int(tokens[0]), int(tokens[-1])]
        hashes.append(_as_int(digest.digest()))
        first_tokens.update(outer_tokens[:1])
        last_tokens.update(outer_tokens[-1:])
    borders = Borders(
        corpus.num_documents,
        num_end_tokens,
        last_token=_only(last_tokens),
        first_token=_only(first_tokens),
    )
    return np.array(hashes, np.uint64), borders


def _only(tokens: set[int]) -> int | None:
    """Returns the token of a set of one; None for others."""
    if len(tokens) != 1:
        return None
    return next(iter(tokens))


def _check_tokens(tokens: IntArray, vocab_size: int, name: str) -> None:
    if not tokens.size:
        return
    smallest = int(tokens.min())
    largest = int(tokens.max())
    if smallest >= 0 and largest < vocab_size:
        return
    # Four-byte tokens are signed and may be negative.
    invalid = smallest
    if largest >= vocab_size:
        invalid = largest
    detail = (
        f"{name} holds token {invalid}, but the tokenizer has {vocab_size} tokens; give the "
        "tokenizer the data were made with"
    )
    raise DataError("vocab_mismatch", detail)


def _prefix_of(source_files: SourceFiles) -> str:
    """Returns the prefix of prepared data; a URI if the source is a URI."""
    if source_files.root.is_local:
        return source_files.root.path
    return source_files.source.path.removesuffix(".bin").removesuffix(".idx")


def _count_tokens(corpus: IndexedDataset, vocab_size: int) -> IntArray:
    """Returns the number of occurrences of each token, [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    pending: list[IntArray] = []
    num_pending = 0
    for sequence in range(len(corpus)):
        tokens = corpus[sequence]
        pending.append(tokens)
        num_pending += len(tokens)
        # In large batches, because each bincount costs a pass over the vocabulary.
        if num_pending >= _COUNT_TOKENS or sequence + 1 == len(corpus):
            counts += np.bincount(np.concatenate(pending), minlength=vocab_size)
            pending = []
            num_pending = 0
    return counts
