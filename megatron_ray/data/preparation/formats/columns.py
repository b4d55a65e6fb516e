"""Finds the column of a table that is the text, and reads its values.

Owns: which Arrow types are text, and the messages about columns. Must not know: how files
of tables are read.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_ray.data.preparation.errors import DataError, short_cause
from megatron_ray.data.preparation.formats.json_lines import AS_ONE_TEXT, TOKENIZED
from megatron_ray.data.preparation.formats.records import (
    BadRecord,
    RecordTally,
    TextChunk,
    chunks_of,
    without_mark,
)

_MAX_NAMES_SHOWN = 8
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    # Some writers mark text as bytes.
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_LIST_TYPES = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
)


class TextColumn:
    """The column of a file that is the text."""

    def __init__(
        self, schema: pa.Schema, text_key: str, name: str, tally: RecordTally
    ) -> None:
        """Raises DataError when there is no such column or it is not text.

        `name` is the file's in messages.
        """
        self._path = _column_path(schema, text_key, name)
        self._name = name
        self._tally = tally
        self._first_row = 1

    @property
    def top_level(self) -> str:
        """Name of the column, or of the struct that it is in."""
        return self._path[0]

    def chunks(self, batch: pa.RecordBatch) -> Iterator[TextChunk]:
        """Yields the texts of the next rows; rows without text are counted."""
        self._tally.num_records += len(batch)
        column = _column(batch, self._path)
        for text in _texts_of(column, self._name, self._first_row, self._tally):
            text = without_mark(text)
            if text:
                yield from chunks_of(text)
            else:
                self._tally.num_without_text += 1
        self._first_row += len(batch)


def _texts_of(
    column: pa.Array, name: str, first_row: int, tally: RecordTally
) -> Iterator[str]:
    """Yields the texts of a column, empty for null; bad rows are counted."""
    try:
        # All at once, which is several times faster than one by one.
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = list(column)
    for row, value in enumerate(values, first_row):
        try:
            if isinstance(value, pa.Scalar):
                value = value.as_py()
            if isinstance(value, bytes):
                value = value.decode()
        except UnicodeDecodeError as error:
            detail = f"{name}, row {row} is not UTF-8 ({short_cause(error)})"
            tally.add_bad(BadRecord(detail, "correct or remove the row", "not_utf8"))
        else:
            yield value or ""


def _column(batch: pa.RecordBatch, path: list[str]) -> pa.Array:
    column = batch.column(path[0])
    for name in path[1:]:
        column = pc.struct_field(column, name)
    return _decoded(column)


def _decoded(column: pa.Array) -> pa.Array:
    """Returns a column whose values are stored one by one."""
    while not (_is_plain_text(column.type) or pa.types.is_null(column.type)):
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(column.type):
            column = pc.run_end_decode(column)
        else:
            column = column.storage
    return column


def _is_plain_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _TEXT_TYPES)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    return _is_plain_text(kind)


def _column_path(schema: pa.Schema, text_key: str, name: str) -> list[str]:
    """Returns the names that lead to the text column.

    Raises DataError when it does not exist or is not text.
    """
    path = _path_to(schema, text_key)
    texts = ", ".join(_text_columns(schema, "")[:_MAX_NAMES_SHOWN]) or "none"
    if path is None:
        columns = ", ".join(schema.names[:_MAX_NAMES_SHOWN])
        detail = (
            f"{name} has no column {text_key!r} (its columns: {columns}); set text_key to "
            f"the column with the text (columns of text: {texts})"
        )
        raise DataError("text_key", detail, "text_key")
    if schema.names.count(path[0]) > 1:
        detail = f"{name} has several columns {path[0]!r}; rename the others"
        raise DataError("text_key", detail, "text_key")
    kind = _type_at(schema, path)
    # Writers give a column of nulls alone no other type.
    if _is_text(kind) or pa.types.is_null(kind):
        return path
    remedy = f"set text_key to a text column (columns of text: {texts})"
    if _holds_ids(kind):
        remedy = f"{TOKENIZED} (columns of text: {texts})"
    elif pa.types.is_map(kind) or _is_list(kind):
        remedy += f", or {AS_ONE_TEXT}"
    detail = f"{name}: column {text_key!r} is {kind}, not text; {remedy}"
    raise DataError("text_key", detail, "text_key")


def _path_to(fields: Iterable[pa.Field], key: str) -> list[str] | None:
    """Returns the names of nested fields that a dotted key stands for.

    A name with a dot in it precedes a path.
    """
    types = {field.name: field.type for field in fields}
    if key in types:
        return [key]
    name, dot, rest = key.partition(".")
    if not dot or not pa.types.is_struct(types.get(name, pa.null())):
        return None
    inner = _path_to(types[name].fields, rest)
    if inner is None:
        return None
    return [name, *inner]


def _type_at(schema: pa.Schema, path: list[str]) -> Any:
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


def _text_columns(fields: Iterable[pa.Field], prefix: str) -> list[str]:
    names = []
    for field in fields:
        name = prefix + field.name
        if pa.types.is_struct(field.type):
            names.extend(_text_columns(field.type.fields, f"{name}."))
        elif _is_text(field.type):
            names.append(name)
    return names


def _holds_ids(kind: pa.DataType) -> bool:
    return _is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _LIST_TYPES)
