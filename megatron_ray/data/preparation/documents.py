"""Reads the documents of a source's files.

Owns: the formats .txt, .jsonl and .parquet. Must not know: tokens, splits, caches.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ray.data.preparation.errors import DataError, read_errors, short_cause
from megatron_ray.data.preparation.sources import SourceFiles, suffix_of
from megatron_ray.storage.files import FileStat, open_random_access, open_stream
from megatron_ray.storage.location import Location

_CHUNK_CHARS = 1 << 18
_PARQUET_ROWS = 1024
_MAX_NAMES_SHOWN = 8


class TextChunk(NamedTuple):
    """Consecutive text of one document.

    A long document is split into several chunks, so that it is never whole in memory.
    """

    text: str
    ends_document: bool


def read_chunks(source_files: SourceFiles) -> Iterator[TextChunk]:
    """Yields all documents of a source, in file order.

    Raises DataError with the file and, in line-based formats, the line.
    """
    for file in source_files.files:
        yield from read_file_chunks(source_files, file)


def read_file_chunks(source_files: SourceFiles, file: FileStat) -> Iterator[TextChunk]:
    """Yields the non-empty documents of one file. Raises DataError."""
    location = source_files.location(file)
    text_key = source_files.source.text_key
    suffix = suffix_of(file.path)
    # Covers reading as well as opening, because disks may fail at any time.
    with read_errors(file.path):
        if source_files.kind == "builtin":
            yield from _read_python(Path(file.path))
        elif suffix == ".jsonl":
            yield from _read_jsonl(location, text_key)
        elif suffix == ".parquet":
            yield from _read_parquet(location, text_key)
        else:
            yield from _read_text(location)


def fingerprint(source_files: SourceFiles) -> str:
    """Returns a hash that changes whenever the content of a source may have changed.

    It covers names, sizes and times. For the builtin corpus it covers the content, so
    that it is the same on every machine. It is part of cache keys.
    """
    parts: list[object] = [source_files.kind, source_files.source.text_key]
    if source_files.kind == "builtin":
        parts.append([chunk.text for chunk in read_chunks(source_files)])
    else:
        for file in source_files.files:
            parts.append([file.path, file.size, file.mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_text(location: Location) -> Iterator[TextChunk]:
    with (
        open_stream(location) as stream,
        # newline="" keeps line ends as they are in the file.
        io.TextIOWrapper(stream, "utf-8", newline="") as reader,
    ):
        text = _read_lines(reader)
        while text:
            # Reads one chunk ahead, to know which chunk is the last.
            next_text = _read_lines(reader)
            yield TextChunk(text, not next_text)
            text = next_text


def _read_lines(reader: io.TextIOWrapper) -> str:
    """Reads a chunk up to the end of a line, which tokens rarely span."""
    text = reader.read(_CHUNK_CHARS)
    if len(text) == _CHUNK_CHARS and not text.endswith("\n"):
        text += reader.readline(_CHUNK_CHARS)
    return text


def _read_python(path: Path) -> Iterator[TextChunk]:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return  # a few files of the standard library are in other encodings on purpose
    if text:
        yield TextChunk(text, True)


def _read_jsonl(location: Location, text_key: str) -> Iterator[TextChunk]:
    with open_stream(location) as stream:
        for number, line in enumerate(stream, 1):
            # A trailing empty line is not a document.
            if line.isspace():
                continue
            text = _text_of_line(line, text_key, f"{location.path}:{number}")
            if text:
                yield TextChunk(text, True)


def _text_of_line(line: bytes, text_key: str, name: str) -> str:
    try:
        record = json.loads(line)
    # RecursionError: a line may exceed the parser's nesting limit.
    except (ValueError, RecursionError) as error:
        detail = f"{name} is not JSON ({short_cause(error)}); correct or remove the line"
        raise DataError("bad_line", detail) from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        detail = f"{name} is a JSON {kind}, not an object with a field {text_key!r}"
        raise DataError("bad_line", detail)
    # The most common error; listing the existing fields shows the right name.
    if text_key not in record:
        fields = ", ".join(sorted(record)[:_MAX_NAMES_SHOWN]) or "none"
        detail = (
            f"{name} has no field {text_key!r} (its fields: {fields}); set text_key to the "
            "field with the text"
        )
        raise DataError("text_key", detail, "text_key")
    text = record[text_key]
    if not isinstance(text, str):
        kind = type(text).__name__
        detail = f"{name}: field {text_key!r} is a {kind}, not text; set text_key"
        raise DataError("text_key", detail, "text_key")
    return text


def _read_parquet(location: Location, text_key: str) -> Iterator[TextChunk]:
    with open_random_access(location) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            detail = f"{location.path} is not a Parquet file: {short_cause(error)}"
            raise DataError("file_type", detail) from error
        _check_column(table.schema_arrow, text_key, location.path)
        # In batches of one column, because a file may be larger than memory.
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield TextChunk(text, True)


def _check_column(schema: pa.Schema, text_key: str, name: str) -> None:
    """Raises DataError when the Parquet schema has no text column `text_key`."""
    if text_key not in schema.names:
        columns = ", ".join(schema.names[:_MAX_NAMES_SHOWN])
        detail = (
            f"{name} has no column {text_key!r} (its columns: {columns}); set text_key to "
            "the column with the text"
        )
        raise DataError("text_key", detail, "text_key")
    kind = schema.field(text_key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        detail = f"{name}: column {text_key!r} is {kind}, not text; set text_key to a text column"
        raise DataError("text_key", detail, "text_key")
