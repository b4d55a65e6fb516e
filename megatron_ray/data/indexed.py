"""Reads and writes Megatron's indexed corpora.

Owns: the .bin/.idx format, byte for byte. Must not know: tokenizers, samples, splits.

`.bin` contains concatenated token ids. `.idx` is little-endian: magic, version, dtype
code, N sequences, D document marks, then N int32 lengths, N int64 byte positions in
`.bin`, D int64 document starts (first 0, last N). Positions need not be contiguous, so
several indices may select sequences of one `.bin` (`write_index`).
"""

import copy
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_ray.exceptions import InputError
from megatron_ray.storage.errors import MissingFileError, storage_errors
from megatron_ray.storage.files import file_stat, open_random_access, read_bytes
from megatron_ray.storage.location import Location, parse_location

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Magic, version, dtype code, N, D.
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_MAX_LENGTH = np.iinfo(np.int32).max

IntArray = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the dtype Megatron stores tokens in.

    Two bytes below 65500 tokens, else four.
    """
    if vocab_size < 65500:
        return np.dtype(np.uint16)
    return np.dtype(np.int32)


@dataclass(frozen=True)
class IndexTable:
    """The content of an .idx file."""

    dtype: np.dtype[Any]
    lengths: IntArray
    """[N] int32, tokens of each sequence."""
    pointers: IntArray
    """[N] int64, byte position of each sequence in the .bin file."""
    documents: IntArray
    """[D] int64, first sequence of each document, closed by N."""


class DamagedCorpusError(InputError, ValueError):
    """A file of a corpus is not one, or has lost its end."""


def read_index(content: bytes | np.memmap[Any, Any], name: str) -> IndexTable:
    """Parses an .idx file; arrays are views of `content`.

    Raises DamagedCorpusError with `name` when it is not an index.
    """
    if len(content) < _HEADER.size or bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise DamagedCorpusError(
            f"{name} is not a Megatron index: it does not start with MMIDIDX"
        )
    header = bytes(content[: _HEADER.size])
    _, version, code, num_sequences, num_documents = _HEADER.unpack(header)
    if version != _VERSION:
        raise DamagedCorpusError(
            f"{name} is a Megatron index of version {version}; only version {_VERSION} can "
            "be read"
        )
    if code not in _DTYPES:
        raise DamagedCorpusError(
            f"{name} has the unknown token type {code}; known are {sorted(_DTYPES)}"
        )
    # Four bytes of length and eight of position per sequence, eight per document mark.
    pointers_at = _HEADER.size + num_sequences * 4
    documents_at = pointers_at + num_sequences * 8
    end = documents_at + num_documents * 8
    if len(content) < end:
        raise DamagedCorpusError(
            f"{name} is cut short: {len(content)} bytes where {num_sequences} sequences "
            f"need {end}"
        )
    return IndexTable(
        dtype=np.dtype(_DTYPES[code]),
        lengths=np.frombuffer(content, "<i4", num_sequences, _HEADER.size),
        pointers=np.frombuffer(content, "<i8", num_sequences, pointers_at),
        documents=np.frombuffer(content, "<i8", num_documents, documents_at),
    )


def write_index(path: Path, table: IndexTable) -> None:
    """Writes an .idx file. Raises OSError."""
    code = _CODES[table.dtype]
    header = _HEADER.pack(_MAGIC, _VERSION, code, len(table.lengths), len(table.documents))
    with path.open("wb") as file:
        file.write(header)
        file.write(np.ascontiguousarray(table.lengths, "<i4").data)
        file.write(np.ascontiguousarray(table.pointers, "<i8").data)
        file.write(np.ascontiguousarray(table.documents, "<i8").data)


class IndexedDataset:
    """A readable corpus: memory-mapped when local, otherwise read by range requests.

    Cheap to open; tokens are read on access only.
    """

    def __init__(self, prefix: str) -> None:
        """Opens `prefix`.idx and `prefix`.bin.

        Raises OSError when a file is missing, DamagedCorpusError when they are not a
        corpus.
        """
        # Unchanged, also if it is a URI, because manifests contain it.
        self.prefix = prefix
        location = parse_location(prefix)
        tokens = location.with_suffix(".bin")
        tokens_stat = file_stat(tokens)
        if tokens_stat is None:
            raise MissingFileError("read", tokens.path, "no such file")
        self.table = _open_index(location.with_suffix(".idx"))
        # Checked now, because it would otherwise yield wrong tokens during training.
        end = self._end_of_tokens()
        if end > tokens_stat.size:
            raise DamagedCorpusError(
                f"{tokens.path} is cut short: {tokens_stat.size} bytes where its index "
                f"needs {end}"
            )
        self._file: Any = None
        self._map: IntArray | None = None
        if not location.is_local:
            self._file = open_random_access(tokens)
        elif tokens_stat.size:  # an empty file cannot be mapped
            # A plain array over the map slices ten times faster than np.memmap itself.
            self._map = np.asarray(np.memmap(tokens.path, np.uint8, "r"))

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return len(self.table.lengths)

    @property
    def lengths(self) -> IntArray:
        """[N] int32, tokens of each sequence."""
        return self.table.lengths

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return self.table.dtype.itemsize

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.table.lengths.sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        """Number of documents; a document may consist of several sequences."""
        return max(len(self.table.documents) - 1, 0)

    def document_ranges(self) -> Iterator[range]:
        """Yields the sequences of each document."""
        starts = self.table.documents.tolist()
        for first, end in pairwise(starts):
            yield range(first, end)

    def begins_document(self, sequence: int) -> bool:
        """Whether a sequence is the first of its document."""
        starts = self.table.documents
        place = int(np.searchsorted(starts, sequence))
        return place < len(starts) and int(starts[place]) == sequence

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> IntArray:
        """Returns `length` tokens of a sequence from token `offset`, in the stored dtype.

        `length` defaults to the rest of the sequence. Read-only when mapped. Raises
        IndexError.
        """
        size = int(self.table.lengths[sequence])
        if length is None:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"tokens {offset}..{offset + length} of sequence {sequence}, which has {size}"
            )
        itemsize = self.table.dtype.itemsize
        start = int(self.table.pointers[sequence]) + offset * itemsize
        num_bytes = length * itemsize
        if self._map is not None:
            return self._map[start : start + num_bytes].view(self.table.dtype)
        # No map and no file: the corpus is empty.
        content = b""
        if self._file is not None:
            content = self._file.read_at(num_bytes, start)
        return np.frombuffer(content, self.table.dtype)

    def view(self, table: IndexTable) -> Self:
        """Returns the same tokens with another index."""
        # Shallow: the memory map and the open file are shared.
        other = copy.copy(self)
        other.table = table
        return other

    def __getitem__(self, sequence: int) -> IntArray:
        """Returns one whole sequence."""
        return self.get(sequence)

    def _end_of_tokens(self) -> int:
        lengths = self.lengths.astype(np.int64)
        ends = self.table.pointers + lengths * self.itemsize
        return int(ends.max(initial=0))


def _open_index(location: Location) -> IndexTable:
    # For a missing index the second branch raises an error with the path.
    if location.is_local and file_stat(location) is not None:
        _require_readable(location.path)
        return read_index(np.memmap(location.path, np.uint8, "r"), location.path)
    return read_index(read_bytes(location), location.path)


def _require_readable(path: str) -> None:
    """Raises StorageError when a file cannot be read; a map of it would end the process."""
    with storage_errors("read", path), open(path, "rb", buffering=0) as file:
        file.read(_HEADER.size)


class IndexedDatasetBuilder:
    """Writes a corpus as a stream, with 8 bytes per sequence in memory and no tokens.

    `close` writes the index, so an interrupted build has none.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        """Starts `prefix`.bin on a local disk. Raises OSError."""
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._file = _with_suffix(prefix, ".bin").open("wb")
        self._lengths: list[int] = []
        self._documents = [0]
        # Number of tokens of the current sequence.
        self._open_tokens = 0

    def add(self, tokens: IntArray | Sequence[int]) -> None:
        """Appends to the current sequence.

        Raises OverflowError when a token does not fit into the dtype.
        """
        values = np.asarray(tokens)
        if values.size == 0:
            return
        limits = np.iinfo(self._dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise OverflowError(f"token {values.max()} does not fit into {self._dtype}")
        # Lengths have 32 bits in the index, so longer documents become several sequences.
        if self._open_tokens + values.size > _MAX_LENGTH:
            self.end_sequence()
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._open_tokens += values.size

    def end_sequence(self) -> None:
        """Closes the current sequence, which may be empty."""
        self._lengths.append(self._open_tokens)
        self._open_tokens = 0

    def end_document(self) -> None:
        """Closes the document: all sequences since the last one."""
        if self._open_tokens:
            self.end_sequence()
        self._documents.append(len(self._lengths))

    def close(self) -> None:
        """Writes the index. Raises OSError."""
        self._file.close()
        lengths = np.array(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        # In 64 bits, because a corpus may be larger than 2 GiB.
        num_bytes = lengths.astype(np.int64) * self._dtype.itemsize
        np.cumsum(num_bytes[:-1], out=pointers[1:])
        documents = np.array(self._documents, np.int64)
        table = IndexTable(self._dtype, lengths, pointers, documents)
        write_index(_with_suffix(self._prefix, ".idx"), table)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # No index after an error, so that the incomplete .bin is never used.
        if kind is None:
            self.close()
        else:
            self._file.close()


def _with_suffix(prefix: Path, suffix: str) -> Path:
    # Not Path.with_suffix, which would replace the part after a dot in the name.
    return prefix.with_name(prefix.name + suffix)
