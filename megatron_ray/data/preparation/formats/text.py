"""Reads text files, each of which is one document.

Owns: the format .txt. Must not know: other formats, tokens.
"""

import io
from collections.abc import Iterator

from megatron_ray.data.preparation.formats.contents import HEAD_BYTES, other_content
from megatron_ray.data.preparation.formats.records import (
    BadRecord,
    RecordTally,
    TextChunk,
    read_chunks_of,
)
from megatron_ray.storage.files import open_stream
from megatron_ray.storage.location import Location


class _OtherContentError(Exception):
    """A file holds something else than text."""

    def __init__(self, record: BadRecord) -> None:
        super().__init__(record.detail)
        self.record = record


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
            for _ in _chunks(location, compression):
                pass
        num_chunks = 0
        for chunk in _chunks(location, compression):
            num_chunks += 1
            yield chunk
    except _OtherContentError as error:
        tally.add_bad(error.record)
        return
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        detail = f"{location.path} is not UTF-8 text (byte 0x{byte:02x})"
        tally.add_bad(BadRecord(detail, "convert it to UTF-8", "not_utf8"))
        return
    if not num_chunks:
        tally.num_without_text += 1


def _chunks(location: Location, compression: str | None) -> Iterator[TextChunk]:
    with open_stream(location, compression) as stream:
        other = other_content(
            stream.peek(HEAD_BYTES)[:HEAD_BYTES], location.path, compression
        )
        if other is not None:
            raise _OtherContentError(other)
        # newline="" keeps line ends as they are in the file.
        with io.TextIOWrapper(stream, "utf-8", newline="") as reader:
            yield from read_chunks_of(reader)
