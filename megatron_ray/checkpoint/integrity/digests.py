"""Detects bytes of a checkpoint that differ from those that were written.

Owns: the digests of a file's blocks, the files that contain them, checked reads.
Torch-free. Must not know: tensors, what follows damage.

Every rank writes one more small file: CRC-32 of each block of the files that it has
written. Blocks, and not whole files, because a rank reads only parts of a file and must
be able to check those. CRC-32 is computed at 2 to 3 GB/s, faster than files are written.
Checkpoints of earlier versions have no digests and are read unchecked.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from megatron_ray.checkpoint.directory import (
    DamagedCheckpointError,
    is_needed,
    read_manifest,
)
from megatron_ray.checkpoint.integrity.tensor_ranges import TensorRanges
from megatron_ray.storage.errors import MissingFileError, StorageError
from megatron_ray.storage.storage import Readable, Storage, Writable, open_storage

BLOCK_BYTES = 1024 * 1024

FOLDER = "digests"
_FORMAT_VERSION = 1


def digests_file(rank: int) -> str:
    """Returns the name of the file with the digests of what a rank has written."""
    return f"{FOLDER}/rank-{rank:05d}.json"


@dataclass(frozen=True)
class FileDigests:
    """The digests of one file."""

    num_bytes: int
    blocks: tuple[int, ...]
    """CRC-32 of each block of BLOCK_BYTES; the last block may be shorter."""


class BlockDigester:
    """Computes the digests of a file while it is written, whatever the sizes of writes."""

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._crc = 0
        self._filled = 0

    def update(self, data: Any) -> None:
        """Adds bytes, as any contiguous buffer."""
        view = memoryview(data).cast("B")
        while view.nbytes:
            part = view[: BLOCK_BYTES - self._filled]
            self._crc = crc32(part, self._crc)
            self._filled += part.nbytes
            view = view[part.nbytes :]
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def digests(self) -> FileDigests:
        """Returns the digests; no bytes can be added afterwards."""
        num_bytes = len(self._blocks) * BLOCK_BYTES + self._filled
        if self._filled:
            self._end_block()
        return FileDigests(num_bytes, tuple(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._crc)
        self._crc = 0
        self._filled = 0


class DigestedFiles:
    """Writes a rank's files of a checkpoint, and at the end one with their digests.

    Methods raise StorageError.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._digests: dict[str, FileDigests] = {}

    @contextmanager
    def open_output(self, name: str) -> Iterator[Writable]:
        """Yields a file, as `Storage.open_output` does."""
        digester = BlockDigester()
        with self._storage.open_output(name) as file:
            yield _DigestedOutput(file, digester)
        self._digests[name] = digester.digests()

    def write_bytes_atomic(self, name: str, content: bytes) -> None:
        """Writes a small file atomically, durable on return."""
        self._storage.write_bytes_atomic(name, content)
        # Files that loading does not need may be edited.
        if is_needed(name):
            self._digests[name] = _digests_of(content)

    def write_digests(self, rank: int) -> int:
        """Writes the digests of everything written so far; returns the file's bytes."""
        rows = {}
        for name, digests in self._digests.items():
            rows[name] = {"bytes": digests.num_bytes, "crc32": digests.blocks}
        body = {
            "format_version": _FORMAT_VERSION,
            "block_bytes": BLOCK_BYTES,
            "files": rows,
        }
        content = json.dumps(body).encode()
        self._storage.write_bytes_atomic(digests_file(rank), content)
        return len(content)


class _DigestedOutput:
    """An output file; digests are those of the memory, before the storage gets it."""

    def __init__(self, file: Writable, digester: BlockDigester) -> None:
        self._file = file
        self._digester = digester

    def write(self, data: Any, /) -> int | None:
        self._digester.update(data)
        return self._file.write(data)


def _digests_of(content: bytes) -> FileDigests:
    digester = BlockDigester()
    digester.update(content)
    return digester.digests()


class CheckedFiles:
    """The files of a checkpoint, whose bytes are compared with their digests when read.

    `names` are all its files. Methods raise DamagedCheckpointError for other bytes than
    were written, StorageError.
    """

    def __init__(self, storage: Storage, path: str, names: Sequence[str]) -> None:
        self._storage = storage
        self._path = path
        self._names = frozenset(names)
        self._by_rank: dict[int, dict[str, FileDigests]] = {}
        self._tensors: TensorRanges | None = None

    def locate_tensors(self, index: Mapping[str, Any]) -> None:
        """Names tensors in errors from now on; `index` is the content of index.json."""
        self._tensors = TensorRanges(index)

    def read_bytes(self, name: str) -> bytes:
        """Returns the content of a small file."""
        content = self._storage.read_bytes(name)
        digests = self._digests(name)
        if digests is not None and _digests_of(content) != digests:
            raise self._damage(name, "it has other bytes than were written")
        return content

    @contextmanager
    def open_input(self, name: str) -> Iterator[Readable]:
        """Yields a file for positioned reads."""
        digests = self._digests(name)
        with self._storage.open_input(name) as source:
            if digests is None:
                yield source
            else:
                yield _CheckedInput(source, digests, self._path, name, self._tensors)

    def verify(self, rank: int) -> None:
        """Reads all files that a rank has written, and checks them."""
        for name in self.written_by(rank):
            for damage in self.damage_in(name):
                raise damage

    def written_by(self, rank: int) -> tuple[str, ...]:
        """Returns the files of a rank that have digests."""
        return tuple(self._digests_of_rank(rank))

    def damage_in(self, name: str) -> Iterator[DamagedCheckpointError]:
        """Reads a file and yields an error for each block with other bytes."""
        digests = self._digests(name)
        if digests is None:
            return
        block = memoryview(bytearray(min(BLOCK_BYTES, digests.num_bytes)))
        with self.open_input(name) as source:
            for start in range(0, digests.num_bytes, BLOCK_BYTES):
                length = min(BLOCK_BYTES, digests.num_bytes - start)
                try:
                    source.read_into(start, block[:length])
                except DamagedCheckpointError as error:
                    yield error

    def _digests(self, name: str) -> FileDigests | None:
        # Files that belong to no rank were written by rank 0.
        _, _, suffix = name.partition("/rank-")
        number = suffix.partition(".")[0]
        rank = int(number) if number.isdigit() else 0
        return self._digests_of_rank(rank).get(name)

    def _digests_of_rank(self, rank: int) -> dict[str, FileDigests]:
        if rank not in self._by_rank:
            self._by_rank[rank] = self._read(digests_file(rank))
        return self._by_rank[rank]

    def _read(self, name: str) -> dict[str, FileDigests]:
        if name not in self._names:
            return {}
        try:
            body = json.loads(self._storage.read_bytes(name))
            # Digests of other blocks cannot be checked by this version.
            if body["block_bytes"] != BLOCK_BYTES:
                return {}
            digests = {}
            for file, row in body["files"].items():
                digests[file] = FileDigests(row["bytes"], tuple(row["crc32"]))
        except (KeyError, TypeError, ValueError, AttributeError, MissingFileError) as error:
            raise self._damage(name, "it is not readable") from error
        return digests

    def _damage(self, name: str, cause: str) -> DamagedCheckpointError:
        return DamagedCheckpointError("load", self._path, f"its file {name}: {cause}")


class _CheckedInput:
    """Positioned reads of whole blocks, of which the requested part is returned."""

    def __init__(
        self,
        source: Readable,
        digests: FileDigests,
        path: str,
        name: str,
        tensors: TensorRanges | None,
    ) -> None:
        self._tensors = tensors
        self._source = source
        self._digests = digests
        self._path = path
        self._name = name
        # Neighbouring reads share a block, which is read and checked once.
        self._block = bytearray()
        self._block_number = -1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with bytes from `offset` on."""
        end = offset + len(buffer)
        position = offset
        while position < end:
            number = position // BLOCK_BYTES
            start = number * BLOCK_BYTES
            stop = self._end_of(number)
            target = buffer[position - offset : min(stop, end) - offset]
            if not target:
                cause = f"its file {self._name} ends at byte {self._digests.num_bytes}"
                raise DamagedCheckpointError("load", self._path, cause)
            if len(target) == stop - start:
                # All whole blocks at once: object stores answer slowly but send fast.
                position = self._read_whole(number, buffer[position - offset :])
            else:
                self._read_block(number)
                first = position - start
                target[:] = memoryview(self._block)[first : first + len(target)]
                position += len(target)

    def _read_whole(self, number: int, buffer: memoryview) -> int:
        """Fills the beginning of a buffer with as many whole blocks as fit.

        Returns the offset behind them.
        """
        start = number * BLOCK_BYTES
        last = number
        while last + 1 < len(self._digests.blocks) and (
            self._end_of(last + 1) - start <= len(buffer)
        ):
            last += 1
        stop = self._end_of(last)
        self._source.read_into(start, buffer[: stop - start])
        for block in range(number, last + 1):
            first = block * BLOCK_BYTES - start
            self._check(block, buffer[first : self._end_of(block) - start])
        return stop

    def _read_block(self, number: int) -> None:
        if number == self._block_number:
            return
        start = number * BLOCK_BYTES
        self._block_number = -1
        self._block = bytearray(self._end_of(number) - start)
        self._source.read_into(start, memoryview(self._block))
        self._check(number, memoryview(self._block))
        self._block_number = number

    def _check(self, number: int, block: memoryview) -> None:
        if crc32(block) != self._digests.blocks[number]:
            start = number * BLOCK_BYTES
            end = self._end_of(number)
            cause = (
                f"its file {self._name} has other bytes than were written, between byte "
                f"{start} and {end}"
            )
            if self._tensors is not None:
                cause += self._tensors.words(self._name, start, end)
            raise DamagedCheckpointError("load", self._path, cause)

    def _end_of(self, number: int) -> int:
        return min((number + 1) * BLOCK_BYTES, self._digests.num_bytes)


def verify_share(path: str, rank: int, world_size: int) -> str | None:
    """Checks this rank's share of a checkpoint's bytes; returns what is wrong, if anything.

    The ranks share the files, so that together they read every byte once.
    """
    try:
        names = tuple(read_manifest(path)["files"])
        files = CheckedFiles(open_storage(path), path, names)
        num_writers = sum(name.startswith(f"{FOLDER}/") for name in names)
        for writer in range(rank, num_writers, world_size):
            files.verify(writer)
    # A file that cannot be read is of no more use than a damaged one.
    except StorageError as error:
        return error.cause
    return None
