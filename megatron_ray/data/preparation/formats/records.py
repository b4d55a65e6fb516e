"""Counts the records of a source and describes the bad ones.

Owns: the words about records without text and about bad ones, the pieces of long
documents. Must not know: formats.
"""

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TextIO

from megatron_ray.data.preparation.errors import DataError

_MAX_COUNTED = 10_000
_MAX_SHOWN = 3
_BYTE_ORDER_MARK = "\ufeff"
_CHUNK_CHARS = 1 << 18


class TextChunk(NamedTuple):
    """Consecutive text of one document.

    A long document is split into several chunks, so that it is never whole in memory.
    """

    text: str
    ends_document: bool


@dataclass(frozen=True)
class BadRecord:
    """A record whose text cannot be read."""

    detail: str
    """Where it is and what is wrong."""
    remedy: str
    code: str = "bad_line"
    field: str = "path"
    """Field of the source to change."""


@dataclass
class RecordTally:
    """The records of a source that were read so far."""

    max_bad_records: int = 0
    num_records: int = 0
    num_without_text: int = 0
    """Records whose text is null, empty or absent."""
    num_bad: int = 0
    first_bad: list[BadRecord] = field(default_factory=list)
    num_empty_files: int = 0
    """Files without any record."""
    first_empty_files: list[str] = field(default_factory=list)

    @property
    def has_too_many_bad(self) -> bool:
        """Whether there are more bad records than the source allows."""
        return self.num_bad > self.max_bad_records

    def add_bad(self, record: BadRecord) -> None:
        """Counts a bad record and keeps it if it is one of the first.

        Raises DataError when there are so many that the others need not be counted.
        """
        self.num_bad += 1
        if len(self.first_bad) < _MAX_SHOWN:
            self.first_bad.append(record)
        if self.num_bad > self.max_bad_records + _MAX_COUNTED:
            self.require_few_bad(of_all=False)

    def add_empty_file(self, path: str) -> None:
        """Counts a file without any record, which may be the rest of a failed copy."""
        self.num_empty_files += 1
        if len(self.first_empty_files) < _MAX_SHOWN:
            self.first_empty_files.append(path)

    def require_few_bad(self, *, of_all: bool) -> None:
        """Raises DataError when there are more bad records than the source allows.

        `of_all` is whether all records were read, so that their number is known.
        """
        if not self.has_too_many_bad:
            return
        first = self.first_bad[0]
        share = self._bad_share()
        if not of_all:
            share = f"{self.num_bad} of the first {self.num_records} rows cannot be read"
        if self.max_bad_records:
            share += f", more than max_bad_records ({self.max_bad_records})"
        detail = f"{share}: {self._examples()}; {first.remedy}"
        # Without a good record nothing would be left.
        if not of_all:
            detail += ", or set max_bad_records to the number of bad rows to leave out"
        elif self.num_bad < self.num_records:
            detail += f", or set max_bad_records to {self.num_bad} to leave them out"
        raise DataError(first.code, detail, first.field)

    def to_json(self) -> dict[str, Any]:
        """Returns the tally for `tally_of_json`."""
        return asdict(self)

    def notes(self, path: str) -> list[str]:
        """Returns sentences about the records of a source that are left out."""
        notes = []
        if self.num_without_text:
            verb = "have"
            if self.num_without_text == 1:
                verb = "has"
            notes.append(
                f"{path}: {self.num_without_text} of {self.num_records} rows {verb} no text: "
                "left out"
            )
        if self.num_bad:
            notes.append(f"{path}: {self._bad_share()}, left out: {self._examples()}")
        if self.num_empty_files:
            shown = ", ".join(self.first_empty_files)
            if self.num_empty_files > len(self.first_empty_files):
                shown += ", ..."
            noun = "file holds"
            if self.num_empty_files > 1:
                noun = "files hold"
            notes.append(f"{path}: {self.num_empty_files} {noun} nothing: {shown}")
        return notes

    def _bad_share(self) -> str:
        return f"{self.num_bad} of {self.num_records} rows cannot be read"

    def _examples(self) -> str:
        shown = "; ".join(record.detail for record in self.first_bad)
        if self.num_bad > len(self.first_bad):
            shown += "; ..."
        return shown


def tally_of_json(values: dict[str, Any]) -> RecordTally:
    """Returns a tally from the result of its `to_json`."""
    first_bad = [BadRecord(**record) for record in values["first_bad"]]
    return RecordTally(**{**values, "first_bad": first_bad})


def chunks_of(text: str) -> Iterator[TextChunk]:
    """Yields a document's text, a long one in chunks."""
    if len(text) <= _CHUNK_CHARS:
        yield TextChunk(text, True)
    else:
        yield from read_chunks_of(io.StringIO(text, newline=""))


def read_chunks_of(reader: TextIO) -> Iterator[TextChunk]:
    """Yields the text of a document in chunks, without the marks it begins with."""
    text = without_mark(_read_lines(reader))
    while text:
        # Reads one chunk ahead, to know which chunk is the last.
        next_text = _read_lines(reader)
        yield TextChunk(text, not next_text)
        text = next_text


def _read_lines(reader: TextIO) -> str:
    """Reads a chunk up to the end of a line, which tokens rarely span."""
    text = reader.read(_CHUNK_CHARS)
    if len(text) == _CHUNK_CHARS and not text.endswith("\n"):
        text += reader.readline(_CHUNK_CHARS)
    return text


def without_mark(text: str) -> str:
    """Returns a document's text without the byte order marks it begins with.

    They remain where a file with a mark was copied into a row.
    """
    return text.lstrip(_BYTE_ORDER_MARK)
