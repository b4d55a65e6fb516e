"""Reads the documents of a source's files.

Owns: which reader reads which file. Must not know: tokens, splits, caches.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megatron_ray.data.mock import mock_documents
from megatron_ray.data.preparation.errors import DataError, read_errors
from megatron_ray.data.preparation.formats.arrow import read_arrow
from megatron_ray.data.preparation.formats.contents import HEAD_BYTES, is_compressed
from megatron_ray.data.preparation.formats.json_lines import read_json_lines
from megatron_ray.data.preparation.formats.parquet import read_parquet
from megatron_ray.data.preparation.formats.records import (
    RecordTally,
    TextChunk,
    without_mark,
)
from megatron_ray.data.preparation.formats.suffixes import file_format
from megatron_ray.data.preparation.formats.text import read_text
from megatron_ray.data.preparation.sources import MOCK, SourceFiles
from megatron_ray.storage.files import FileStat, open_stream, read_bytes
from megatron_ray.storage.location import Location

# Part of every fingerprint; to be increased when the same files yield other documents.
_FORMAT = 2
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 200


def read_chunks(
    source_files: SourceFiles, tally: RecordTally | None = None
) -> Iterator[TextChunk]:
    """Yields all documents of a source, in file order, and counts its records in `tally`.

    Raises DataError, at the end if there are more bad records than the source allows.
    """
    if tally is None:
        tally = new_tally(source_files)
    for file in source_files.files:
        yield from read_file_chunks(source_files, file, tally)
    tally.require_few_bad(of_all=True)


def new_tally(source_files: SourceFiles) -> RecordTally:
    """Returns a tally with the source's limit of bad records."""
    return RecordTally(source_files.source.max_bad_records)


def read_file_chunks(
    source_files: SourceFiles, file: FileStat, tally: RecordTally | None = None
) -> Iterator[TextChunk]:
    """Yields the non-empty documents of one file.

    Bad records are counted in `tally` and otherwise passed over. Raises DataError.
    """
    if tally is None:
        tally = new_tally(source_files)
    num_records = tally.num_records
    # Covers reading as well as opening, because disks may fail at any time.
    with read_errors(file.path, _read_remedy(file)):
        if source_files.source.path == MOCK:
            part = int(file.path.rpartition("/")[2])
            for text in mock_documents(part):
                yield TextChunk(text, True)
            return
        if source_files.kind == "builtin":
            yield from _read_python(Path(file.path))
            return
        try:
            yield from _read_file(source_files, file, tally)
        except OSError:
            _require_compressed(source_files.location(file))
            raise
    if tally.num_records == num_records:
        tally.add_empty_file(file.path)


def fingerprint(source_files: SourceFiles) -> str:
    """Returns a hash that changes whenever the content of a source may have changed.

    It covers names, sizes and times. For the builtin corpus it covers the content, so
    that it is the same on every machine. It is part of cache keys.
    """
    source = source_files.source
    parts: list[object] = [source_files.kind, source.text_key]
    if source_files.kind == "text":
        parts += [_FORMAT, source.max_bad_records]
    if source_files.kind == "builtin":
        parts.append([chunk.text for chunk in read_chunks(source_files)])
    else:
        for file in source_files.files:
            parts.append([file.path, file.size, file.mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_file(
    source_files: SourceFiles, file: FileStat, tally: RecordTally
) -> Iterator[TextChunk]:
    location = source_files.location(file)
    _require_content(location, file)
    source = source_files.source
    form = file_format(file.path)
    assert form is not None, "files of other formats are left out"
    if form.kind == "json_lines":
        return read_json_lines(location, form.compression, source.text_key, tally)
    if form.kind == "parquet":
        return read_parquet(location, source.text_key, tally)
    if form.kind == "arrow":
        return read_arrow(location, source.text_key, tally)
    # A bad file is left out as a whole only if bad records are allowed.
    checks_first = source.max_bad_records > 0
    return read_text(location, form.compression, tally, checks_first=checks_first)


def _read_remedy(file: FileStat) -> str:
    """Returns what to do about an error that does not show its cause."""
    form = file_format(file.path)
    if form is not None and form.compression is not None:
        return "check that the file is complete, or unpack it"
    if form is not None and form.is_table:
        return "check that the file is complete"
    return "check the path and the credentials"


def _require_compressed(location: Location) -> None:
    """Raises DataError when a file that is named as compressed is not."""
    form = file_format(location.path)
    if form is None or form.compression is None:
        return
    with open_stream(location) as stream:
        head = stream.read(HEAD_BYTES)
    if not is_compressed(head, form.compression):
        suffix = PurePosixPath(location.path).suffix
        detail = f"{location.path} is not compressed; take {suffix} off its name"
        raise DataError("file_type", detail)


def _require_content(location: Location, file: FileStat) -> None:
    """Raises DataError when a clone without Git LFS left a pointer in place of a file."""
    if file.size > _MAX_POINTER_BYTES:
        return
    if read_bytes(location).startswith(_POINTER):
        detail = f"{file.path} is a pointer of Git LFS, not the data; run git lfs pull"
        raise DataError("file_type", detail)


def _read_python(path: Path) -> Iterator[TextChunk]:
    try:
        text = without_mark(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return  # a few files of the standard library are in other encodings on purpose
    if text:
        yield TextChunk(text, True)
