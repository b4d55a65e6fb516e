"""Checks the data of a config before a job is accepted.

Owns: the checks that take at most a second. Must not know: tokenizing, caches, jobs.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_ray.config.data import DataConfig
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.config.problem import Problem
from megatron_ray.data.indexed import IndexedDataset
from megatron_ray.data.preparation.data_files import SourceAt, find_data
from megatron_ray.data.preparation.documents import new_tally, read_file_chunks
from megatron_ray.data.preparation.errors import DataError, UnusableDataError
from megatron_ray.data.preparation.formats.records import TextChunk
from megatron_ray.data.preparation.formats.suffixes import FileFormat, file_format
from megatron_ray.data.preparation.given_tokenizer import check_rows, given_tokenizer
from megatron_ray.data.preparation.sources import SourceFiles
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.files import FileStat, check_writable
from megatron_ray.storage.location import parse_location

_CHECKED_FILES = 4
_CHECKED_CHUNKS = 256
_CHECKED_CHARS = 1 << 18


class DataCheck(NamedTuple):
    """What is known of the data without preparing them."""

    problems: list[Problem]
    notes: list[str]
    """Sentences about files that are left out, and about the tokenizer."""


def check_data(
    data: DataConfig,
    seq_length: int,
    storage_path: str,
    *,
    weights: ModelTokenizer | None = None,
    rows: int | None = None,
) -> DataCheck:
    """Returns the definite problems of the data, and what is left out of them.

    Checks paths, the first documents of each source, the tokenizer, the amount of text,
    and write access to storage. `weights` is the tokenizer of the weights that the run
    begins with, `rows` the model's vocabulary, where they are known.

    Reads a few kilobytes and tokenizes nothing, so `prepare` may find more problems.
    Writes and deletes one small file below `storage_path` (and data.cache), and creates
    no folder on a local disk.
    """
    data_files = find_data(data, weights)
    problems = list(data_files.problems)
    required = seq_length + 1
    required_for_training = required
    # Held-out documents are taken from the same text, so a single source must be long
    # enough for both.
    if len(data.train) == 1 and not data_files.validation and data.validation_fraction:
        required_for_training = 2 * required
    for source_at in data_files.train:
        problems += _source_problems(source_at, data, required_for_training)
    for source_at in data_files.validation:
        problems += _source_problems(source_at, data, required)
    notes = data_files.notes
    try:
        notes += _tokenizer_notes(data, weights, rows)
    except UnusableDataError as error:
        problems += error.problems
    problems += _storage_problems("/storage/path", storage_path)
    if data.cache is not None:
        problems += _storage_problems("/data/cache", data.cache)
    return DataCheck(problems, notes)


def _tokenizer_notes(
    data: DataConfig, weights: ModelTokenizer | None, rows: int | None
) -> Sequence[str]:
    """Returns what was decided about the tokenizer. Raises UnusableDataError."""
    given = given_tokenizer(data.tokenizer, weights)
    if given is None:
        return ()
    check_rows(given.tokenizer, rows, weights)
    return given.notes


def _source_problems(source_at: SourceAt, data: DataConfig, required: int) -> list[Problem]:
    pointer, source_files = source_at
    try:
        max_tokens = _max_tokens(source_files, data)
    except DataError as error:
        return [error.problem(pointer)]
    if max_tokens is None or max_tokens >= required:
        return []
    detail = (
        f"{source_files.source.path} has at most {max_tokens} tokens, but at least "
        f"{required} are needed for samples of seq_length + 1; give more text or lower "
        "training.seq_length"
    )
    return [Problem(f"{pointer}/path", "too_short", detail)]


def _max_tokens(source_files: SourceFiles, data: DataConfig) -> int | None:
    """Returns an upper bound of the tokens; None if the size implies none.

    Raises DataError when the first documents are unreadable.
    """
    if source_files.kind == "prepared":
        return _num_prepared_tokens(source_files)
    files = source_files.files
    tally = new_tally(source_files)
    checked = _files_to_check(files)
    num_with_text = 0
    for file in checked:
        num_with_text += _read_beginning(read_file_chunks(source_files, file, tally))
    tally.require_few_bad(of_all=False)
    if not num_with_text and len(files) == len(checked):
        detail = f"{source_files.source.path} holds no text; give files with text in them"
        raise DataError("empty", detail)
    # Compressed text is longer than its file, and a user's tokenizer may normalize text to
    # longer text.
    is_compressed = any(_is_compressed(file) for file in files)
    if is_compressed or data.tokenizer.kind == "file":
        return None
    # A byte-level token has at least one byte, and each file's last document adds an end
    # token. In jsonl the syntax has more bytes than there are end tokens.
    return source_files.num_bytes + len(files)


def _files_to_check(files: Sequence[FileStat]) -> list[FileStat]:
    """Returns the first files that are not empty, and the first one of each format."""
    with_content = [file for file in files if file.size]
    first_of_format: dict[FileFormat | None, FileStat] = {}
    for file in with_content:
        first_of_format.setdefault(file_format(file.path), file)
    # Each once.
    return list(dict.fromkeys([*with_content[:_CHECKED_FILES], *first_of_format.values()]))


def _read_beginning(chunks: Iterator[TextChunk]) -> bool:
    """Reads the first documents of a file, whose tally shows what is wrong with them.

    Returns whether there are any.
    """
    num_chars = 0
    for chunk in itertools.islice(chunks, _CHECKED_CHUNKS):
        num_chars += len(chunk.text)
        if num_chars > _CHECKED_CHARS:
            break
    return num_chars > 0


def _is_compressed(file: FileStat) -> bool:
    form = file_format(file.path)
    # Files of the builtin corpus have no format.
    return form is not None and (form.is_table or form.compression is not None)


def _num_prepared_tokens(source_files: SourceFiles) -> int | None:
    if not source_files.root.is_local:
        return None  # the index of a large remote corpus takes long to fetch
    try:
        return IndexedDataset(source_files.root.path).num_tokens
    except (OSError, ValueError) as error:
        raise DataError("bad_corpus", f"{error}; prepare the data again") from error


def _storage_problems(pointer: str, path: str) -> list[Problem]:
    try:
        check_writable(parse_location(path))
    except StorageError as error:
        detail = (
            f"{path} cannot be written where the job runs: {error.cause}; give a folder or "
            "URI that it may write"
        )
        return [Problem(pointer, "not_writable", detail)]
    return []
