"""Reads Parquet files, one of whose columns is the text.

Owns: the format .parquet. Must not know: other formats, tokens.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ray.data.preparation.errors import DataError, short_cause
from megatron_ray.data.preparation.formats.columns import TextColumn
from megatron_ray.data.preparation.formats.records import RecordTally, TextChunk
from megatron_ray.storage.files import open_random_access
from megatron_ray.storage.location import Location

_ROWS = 1024


def read_parquet(
    location: Location, text_key: str, tally: RecordTally
) -> Iterator[TextChunk]:
    """Yields the text of each row; a row without one is counted.

    Raises DataError when there is no such column or it is not text.
    """
    with open_random_access(location) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            cause = short_cause(error).rstrip(".")
            detail = (
                f"{location.path} is not a Parquet file: {cause}; check that it is complete, or "
                "name it by what it holds"
            )
            raise DataError("file_type", detail) from error
        column = TextColumn(table.schema_arrow, text_key, location.path, tally)
        # In batches of one column, because a file may be larger than memory.
        for batch in table.iter_batches(batch_size=_ROWS, columns=[text_key]):
            yield from column.chunks(batch)
