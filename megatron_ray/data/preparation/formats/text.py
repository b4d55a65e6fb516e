"""Reads text files, each of which is one document.

Owns: the format .txt. Must not know: other formats, tokens.
"""

import io
from collections.abc import Iterator
from typing import IO

from megatron_ray.data.preparation.formats.records import (
    BadRecord,
    RecordTally,
    TextChunk,
    without_mark,
)
from megatron_ray.storage.files import open_stream
from megatron_ray.storage.location import Location

_CHUNK_CHARS = 1 << 18


def read_text(
    location: Location, compression: str | None, tally: RecordTally, *, checks_first: bool
) -> Iterator[TextChunk]:
    """Yields the text of a file in chunks.

    A file that is not UTF-8 is a bad record. With `checks_first` nothing of it is
    yielded, at the price of reading each file twice.
    """
    tally.num_records += 1
    try:
        if checks_first:
            with open_stream(location, compression) as stream:
                for _ in _chunks(stream):
                    pass
        num_chunks = 0
        with open_stream(location, compression) as stream:
            for chunk in _chunks(stream):
                num_chunks += 1
                yield chunk
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        detail = f"{location.path} is not UTF-8 text (byte 0x{byte:02x})"
        tally.add_bad(BadRecord(detail, "convert it to UTF-8", "not_utf8"))
        return
    if not num_chunks:
        tally.num_without_text += 1


def _chunks(stream: IO[bytes]) -> Iterator[TextChunk]:
    # newline="" keeps line ends as they are in the file.
    with io.TextIOWrapper(stream, "utf-8", newline="") as reader:
        text = without_mark(_read_lines(reader))
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
