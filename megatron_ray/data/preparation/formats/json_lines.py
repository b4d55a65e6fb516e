"""Reads JSON lines: one object per line, one of whose fields is the text.

Owns: the formats .jsonl and .json. Must not know: other formats, tokens.
"""

import codecs
import json
import shlex
from collections.abc import Iterator
from typing import Any

from megatron_ray.data.preparation.errors import DataError, short_cause
from megatron_ray.data.preparation.formats.contents import HEAD_BYTES, other_content
from megatron_ray.data.preparation.formats.records import (
    BadRecord,
    RecordTally,
    TextChunk,
    chunks_of,
    without_mark,
)
from megatron_ray.storage.files import open_stream
from megatron_ray.storage.location import Location

TOKENIZED = (
    "the data are already tokenized; write the ids as a .bin/.idx pair of Megatron's format "
    "and give its name without suffix as path, or set text_key to the text"
)
"""What to do with token ids in place of text."""
AS_ONE_TEXT = "write the parts of each row as one text"
"""What to do with lists, such as the messages of a chat."""
_MAX_NAMES_SHOWN = 8
_ENOUGH_OBJECTS = 1000
_UNPACKERS = {"gzip": "gzip -dc", "zstd": "zstd -dc", "bz2": "bzip2 -dc", "xz": "xz -dc"}
_ABSENT = object()
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""Types of JSON values as users call them."""


def read_json_lines(
    location: Location, compression: str | None, text_key: str, tally: RecordTally
) -> Iterator[TextChunk]:
    """Yields the text of each line; a line without one is counted.

    Raises DataError when the file is no JSON lines, or when none of its first objects has
    the field.
    """
    reader = _LineReader(location.path, compression, text_key, tally)
    with open_stream(location, compression) as stream:
        other = other_content(
            stream.peek(HEAD_BYTES)[:HEAD_BYTES], location.path, compression
        )
        if other is not None:
            raise DataError(other.code, f"{other.detail}; {other.remedy}")
        for number, line in enumerate(stream, 1):
            # Files with a mark may have been joined to one.
            line = line.removeprefix(codecs.BOM_UTF8)
            # A trailing empty line is not a document.
            if line and not line.isspace():
                text = reader.text_of(line, number)
                if text:
                    yield from chunks_of(text)
    reader.require_field()


class _LineReader:
    """Reads the lines of one file."""

    def __init__(
        self, path: str, compression: str | None, text_key: str, tally: RecordTally
    ) -> None:
        self._path = path
        self._compression = compression
        self._text_key = text_key
        self._tally = tally
        self._num_lines = 0
        self._has_field = False
        self._other_fields: list[str] | None = None
        """Of the first object without the field."""

    def text_of(self, line: bytes, number: int) -> str:
        """Returns a line's text; nothing if it has none or is bad, which is counted."""
        self._num_lines += 1
        self._tally.num_records += 1
        record = self._parsed(line, number)
        if record is None:
            return ""
        text = field_of(record, self._text_key)
        if isinstance(text, str):
            self._has_field = True
            text = without_mark(text)
            self._tally.num_without_text += not text
            return text
        if text is _ABSENT:
            self._on_absent(record)
            self._tally.num_without_text += 1
            return ""
        self._has_field = True
        if text is None:
            self._tally.num_without_text += 1
        else:
            self._tally.add_bad(self._not_text(text, number))
        return ""

    def require_field(self) -> None:
        """Raises DataError when there were objects and none had the field."""
        if self._has_field or self._other_fields is None:
            return
        fields = ", ".join(self._other_fields[:_MAX_NAMES_SHOWN]) or "none"
        detail = (
            f"{self._path} has no field {self._text_key!r} in its first {self._num_lines} "
            f"lines (fields of the first: {fields}); set text_key to the field with the text"
        )
        raise DataError("text_key", detail, "text_key")

    def _parsed(self, line: bytes, number: int) -> dict[str, Any] | None:
        """Returns the object of a line; None if it is bad, which is counted."""
        try:
            # Decoded here, because the parser would guess UTF-16 from zero bytes. Lone
            # surrogates are replaced by the tokenizer.
            record = json.loads(line.decode("utf-8", "surrogatepass"))
        # RecursionError: a line may exceed the parser's nesting limit.
        except (ValueError, RecursionError) as error:
            self._require_lines(line)
            detail = f"{self._path}:{number} is not JSON ({short_cause(error)})"
            self._tally.add_bad(BadRecord(detail, "correct or remove the line"))
            return None
        if isinstance(record, dict):
            return record
        name = f"{self._path}:{number}"
        if isinstance(record, list) and record and isinstance(record[0], dict):
            self._require_lines(line)
        detail = (
            f"{name} is {_kind_of(record)}, not an object with a field {self._text_key!r}"
        )
        self._tally.add_bad(BadRecord(detail, "correct or remove the line"))
        return None

    def _require_lines(self, line: bytes) -> None:
        """Raises DataError when a first line shows that the file is no JSON lines."""
        if self._num_lines > 1:
            return
        start = line.strip()
        jq_filter = None
        if start == b"[" or start.startswith((b"[{", b"[ {")):
            jq_filter = ".[]"
        elif start == b"{":
            jq_filter = "."
        if jq_filter is not None:
            detail = (
                f"{self._path} is one JSON value, not JSON lines; write one object per line, "
                f"for example with: {self._conversion(jq_filter)}"
            )
            raise DataError("file_type", detail)

    def _conversion(self, jq_filter: str) -> str:
        """Returns a shell command that prints the file's objects, one a line."""
        path = shlex.quote(self._path)
        if self._compression is None:
            return f"jq -c '{jq_filter}' {path}"
        return f"{_UNPACKERS[self._compression]} {path} | jq -c '{jq_filter}'"

    def _on_absent(self, record: dict[str, Any]) -> None:
        if self._other_fields is None:
            self._other_fields = sorted(record)
        # A wrong text_key is reported before the whole file is read.
        if self._num_lines >= _ENOUGH_OBJECTS:
            self.require_field()

    def _not_text(self, value: Any, number: int) -> BadRecord:
        name = f"{self._path}:{number}: field {self._text_key!r}"
        remedy = "set text_key to a field with text"
        if isinstance(value, dict) and value:
            inner = f"{self._text_key}.{min(value)}"
            remedy = f"set text_key to a field in it, such as {inner}"
        elif _are_ids(value):
            remedy = TOKENIZED
        elif isinstance(value, list):
            remedy = f"{AS_ONE_TEXT}, or {remedy}"
        detail = f"{name} is {_kind_of(value)}, not text"
        return BadRecord(detail, remedy, "text_key", "text_key")


def field_of(record: dict[str, Any], key: str) -> Any:
    """Returns the value of a field, or of one in an object at a dotted path.

    A name with a dot in it precedes a path.
    """
    if key in record:
        return record[key]
    name, dot, rest = key.partition(".")
    inner = record.get(name)
    if not dot or not isinstance(inner, dict):
        return _ABSENT
    return field_of(inner, rest)


def _kind_of(value: Any) -> str:
    return _KINDS[type(value)]


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)
