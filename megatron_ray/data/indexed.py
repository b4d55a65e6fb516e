"""Megatron's indexed corpus, byte for byte.

Owns: the .bin/.idx format. Must not know: tokenizers, samples, splits.

`.bin` holds token ids back to back. `.idx` is little-endian: magic, version, dtype
code, N sequences, D document marks, then N int32 lengths, N int64 byte positions in
`.bin`, D int64 document starts (first 0, last N). Positions need not be contiguous, so
an index may select sequences of a `.bin` that it shares (`write_index`).
"""

import copy
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_ray.storage.errors import MissingFileError
from megatron_ray.storage.files import file_stat, open_random_access, read_bytes
from megatron_ray.storage.location import parse_location

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
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
    """The dtype Megatron stores tokens in: two bytes below 65500 tokens, else four."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


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


def read_index(content: bytes | np.memmap[Any, Any], name: str) -> IndexTable:
    """Parses an .idx file; arrays are views of `content`.

    Raises ValueError that names `name` when it is no such file.
    """
    if len(content) < _HEADER.size or bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise ValueError(f"{name} is not a Megatron index: it does not start with MMIDIDX")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(
        bytes(content[: _HEADER.size])
    )
    if version != _VERSION:
        raise ValueError(
            f"{name} is a Megatron index of version {version}; only version {_VERSION} can be read"
        )
    if code not in _DTYPES:
        raise ValueError(
            f"{name} has the unknown token type {code}; known are {sorted(_DTYPES)}"
        )
    need = _HEADER.size + num_sequences * 12 + num_documents * 8
    if len(content) < need:
        raise ValueError(
            f"{name} is cut short: {len(content)} bytes where {num_sequences} sequences need {need}"
        )
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEADER.size)
    pointers = np.frombuffer(
        content, "<i8", num_sequences, _HEADER.size + num_sequences * 4
    )
    documents = np.frombuffer(
        content, "<i8", num_documents, _HEADER.size + num_sequences * 12
    )
    return IndexTable(np.dtype(_DTYPES[code]), lengths, pointers, documents)


def write_index(path: Path, table: IndexTable) -> None:
    """Writes an .idx file. Raises OSError."""
    header = _HEADER.pack(
        _MAGIC, _VERSION, _CODES[table.dtype], len(table.lengths), len(table.documents)
    )
    with path.open("wb") as file:
        file.write(header)
        for array, dtype in (
            (table.lengths, "<i4"),
            (table.pointers, "<i8"),
            (table.documents, "<i8"),
        ):
            file.write(np.ascontiguousarray(array, dtype).data)


class IndexedDataset:
    """Reads a corpus: memory-mapped when local, by ranges through pyarrow.fs when not.

    Cheap to open; nothing is loaded ahead.
    """

    def __init__(self, prefix: str) -> None:
        """Opens `prefix`.idx and `prefix`.bin.

        Raises OSError when one is missing, ValueError when they are not a corpus.
        """
        self.prefix = prefix
        where = parse_location(prefix)
        index = where.with_suffix(".idx")
        tokens = where.with_suffix(".bin")
        found = file_stat(tokens)
        if found is None:
            raise MissingFileError("read", tokens.path, "no such file")
        local_index = where.is_local and file_stat(index) is not None
        content = np.memmap(index.path, np.uint8, "r") if local_index else read_bytes(index)
        self.table = read_index(content, index.path)
        end = int(
            (self.table.pointers + self.lengths.astype(np.int64) * self.itemsize).max(
                initial=0
            )
        )
        if end > found.size:
            raise ValueError(
                f"{tokens.path} is cut short: {found.size} bytes where its index needs {end}"
            )
        self._file = None if where.is_local else open_random_access(tokens)
        # An empty file cannot be mapped. A plain array over the map slices ten times
        # faster than np.memmap itself.
        self._map = (
            np.asarray(np.memmap(tokens.path, np.uint8, "r"))
            if where.is_local and found.size
            else None
        )

    def __len__(self) -> int:
        """Sequences."""
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
        """Documents; one of them may be several sequences."""
        return max(len(self.table.documents) - 1, 0)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> IntArray:
        """`length` tokens (default: the rest) of a sequence from token `offset`, in the
        stored dtype; read-only when mapped.
        """
        size = int(self.table.lengths[sequence])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"tokens {offset}..{offset + length} of sequence {sequence}, which has {size}"
            )
        start = int(self.table.pointers[sequence]) + offset * self.itemsize
        if self._map is not None:
            return self._map[start : start + length * self.itemsize].view(self.table.dtype)
        content = (
            b"" if self._file is None else self._file.read_at(length * self.itemsize, start)
        )
        return np.frombuffer(content, self.table.dtype)

    def view(self, table: IndexTable) -> Self:
        """The same .bin seen through another index."""
        other = copy.copy(self)
        other.table = table
        return other

    def __getitem__(self, sequence: int) -> IntArray:
        """One whole sequence."""
        return self.get(sequence)


class IndexedDatasetBuilder:
    """Writes a corpus, streaming: memory holds 8 bytes a sequence, never tokens.

    `close` writes the index, so a dead build has none.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        """Starts `prefix`.bin on a local disk. Raises OSError."""
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._file = _with_suffix(prefix, ".bin").open("wb")
        self._lengths: list[int] = []
        self._documents = [0]
        self._open_tokens = 0

    def add(self, tokens: IntArray | Sequence[int]) -> None:
        """Appends to the sequence under way.

        Raises OverflowError when a token does not fit into the dtype.
        """
        values = np.asarray(tokens)
        if values.size == 0:
            return
        limits = np.iinfo(self._dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise OverflowError(f"token {values.max()} does not fit into {self._dtype}")
        if self._open_tokens + values.size > _MAX_LENGTH:
            self.end_sequence()
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._open_tokens += values.size

    def end_sequence(self) -> None:
        """Closes the sequence under way, which may be empty."""
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
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        table = IndexTable(
            self._dtype, lengths, pointers, np.array(self._documents, np.int64)
        )
        write_index(_with_suffix(self._prefix, ".idx"), table)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
