"""Reads Arrow files, one of whose columns is the text.

Owns: the formats .arrow, .feather and .ipc, as Arrow and Hugging Face's datasets write
them. Must not know: other formats, tokens.
"""

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import ipc

from megatron_ray.data.preparation.errors import DataError, short_cause
from megatron_ray.data.preparation.formats.columns import TextColumn
from megatron_ray.data.preparation.formats.records import RecordTally, TextChunk
from megatron_ray.storage.files import open_random_access
from megatron_ray.storage.location import Location

_FILE_MAGIC = b"ARROW1"
"""First bytes of a file that ends in a table of its batches; a stream has none."""
_FEATHER_1 = b"FEA1"


def read_arrow(
    location: Location, text_key: str, tally: RecordTally
) -> Iterator[TextChunk]:
    """Yields the text of each row; a row without one is counted.

    Raises DataError when there is no such column or it is not text.
    """
    with open_random_access(location) as file:
        head = file.read(len(_FILE_MAGIC))
        file.seek(0)
        if head.startswith(_FEATHER_1):
            detail = (
                f"{location.path} is of version 1 of Feather, which is not read; convert it to "
                ".parquet or .jsonl"
            )
            raise DataError("file_type", detail)
        try:
            reader = ipc.open_file(file) if head == _FILE_MAGIC else ipc.open_stream(file)
        except pa.ArrowInvalid as error:
            cause = short_cause(error).rstrip(".")
            detail = (
                f"{location.path} is not an Arrow file: {cause}; check that it is complete, or "
                "name it by what it holds"
            )
            raise DataError("file_type", detail) from error
        column = TextColumn(reader.schema, text_key, location.path, tally)
        for batch in _batches(reader):
            yield from column.chunks(batch)


def _batches(
    reader: ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader,
) -> Iterator[pa.RecordBatch]:
    """Yields the batches one by one, because a file may be larger than memory."""
    if isinstance(reader, ipc.RecordBatchStreamReader):
        yield from reader
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)
