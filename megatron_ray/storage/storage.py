"""Reads and writes the files of a job below one root, on any storage.

Owns: names relative to the root, atomic and durable writes. Must not know: the contents
of files.

Local paths and `file://` use the operating system (fsync, rename); `s3://` and `gs://`
use pyarrow.fs, where one put is atomic.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pyarrow import fs

from megatron_ray.storage.durable import PARTIAL_SUFFIX, atomic_file, fsync_path
from megatron_ray.storage.errors import InvalidLocationError, StorageError, storage_errors
from megatron_ray.storage.location import parse_location

_SCHEMES = ("file", "s3", "gs", "gcs")


class Writable(Protocol):
    """An output file that `open_output` yields; `write` takes any contiguous buffer."""

    def write(self, data: Any, /) -> int | None:
        """Writes all bytes of the buffer."""


class Readable(Protocol):
    """An input file that `open_input` yields: positioned reads, known size."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with bytes from `offset` on.

        Raises StorageError when the file ends too early.
        """


@dataclass(frozen=True)
class Entry:
    """One file or folder found by `list`."""

    name: str
    """Relative to the listed folder, parts joined by `/`."""
    is_folder: bool
    size: int
    """Bytes; 0 for a folder."""


class Storage(ABC):
    """Files under one root; every name is relative to it, `/` between parts.

    All methods raise StorageError.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def uri(self, name: str = "") -> str:
        """Returns the root joined with a name, for messages and for `open_storage`."""
        if not name:
            return self.root
        return f"{self.root.rstrip('/')}/{name}"

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Returns the whole file. Raises MissingFileError when there is none."""

    def write_bytes_atomic(self, name: str, data: bytes) -> None:
        """Writes the file atomically, durable on return; creates parent folders."""
        with self.open_output(name) as file:
            file.write(data)

    @abstractmethod
    def open_output(self, name: str) -> AbstractContextManager[Writable]:
        """Returns a context manager that yields a Writable.

        The file appears, durable, at a normal exit and (locally) never otherwise.
        """

    @abstractmethod
    def open_input(self, name: str) -> AbstractContextManager[Readable]:
        """Returns a context manager that yields a Readable.

        Raises MissingFileError when there is no such file.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Returns whether a file or folder exists."""

    @abstractmethod
    def list(self, name: str = "", *, recursive: bool = False) -> list[Entry]:
        """Returns the entries of a folder, sorted by name; none when it does not exist.

        Unfinished writes are left out.
        """

    @abstractmethod
    def delete_file(self, name: str) -> None:
        """Deletes a file if it exists."""

    @abstractmethod
    def delete_tree(self, name: str) -> None:
        """Deletes a folder recursively if it exists.

        Raises StorageError for the root itself.
        """

    def _require_inside(self, name: str) -> str:
        # An empty name would delete the root, and `..` would reach files of other jobs.
        if not name or name.startswith("/") or ".." in name.split("/"):
            cause = "a name inside the storage root is needed"
            raise StorageError("use", f"{name!r} under {self.root}", cause)
        return name


def open_storage(path: str) -> Storage:
    """Opens storage rooted at a local path or a URI.

    Raises InvalidLocationError for a scheme or URI that is not supported, StorageError
    when it cannot be opened.
    """
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in _SCHEMES:
        known = ", ".join(f"{known}://" for known in _SCHEMES)
        cause = f"unknown scheme {scheme!r}; use a local path or one of {known}"
        raise InvalidLocationError("open", path, cause)
    location = parse_location(path)
    # Normalized, because the operating system resolves `..` only in existing folders.
    if location.is_local:
        return LocalStorage(os.path.abspath(location.path))
    if not location.path.strip("/"):
        raise InvalidLocationError("open", path, "the URI names no bucket")
    return ObjectStorage(path, location.filesystem, location.path)


class LocalStorage(Storage):
    """A folder of this machine or of a shared filesystem."""

    def read_bytes(self, name: str) -> bytes:
        """Returns the whole file."""
        path = self._path(name)
        with storage_errors("read", str(path)):
            return path.read_bytes()

    @contextmanager
    def open_output(self, name: str) -> Iterator[Writable]:
        """Yields a file under a temporary name, renamed at a normal exit."""
        path = self._path(name)
        with storage_errors("write", str(path)), atomic_file(path) as file:
            yield _CompleteWriter(file)

    @contextmanager
    def open_input(self, name: str) -> Iterator[Readable]:
        """Yields a file for positioned reads."""
        path = self._path(name)
        with storage_errors("read", str(path)), open(path, "rb", buffering=0) as file:
            yield _LocalInput(file, str(path))

    def exists(self, name: str) -> bool:
        """Returns whether a file or folder exists."""
        path = self._path(name)
        # A storage that does not answer is no proof that a file is missing.
        with storage_errors("look for", str(path)):
            return path.exists()

    def list(self, name: str = "", *, recursive: bool = False) -> list[Entry]:
        """Returns the entries of a folder, sorted by name."""
        folder = Path(self.root)
        if name:
            folder = self._path(name)
        with storage_errors("list", str(folder)):
            if not folder.is_dir():
                return []
            return sorted(_scan(folder, "", recursive), key=lambda entry: entry.name)

    def delete_file(self, name: str) -> None:
        """Deletes a file, durably: the order of deletions matters to readers."""
        path = self._path(name)
        with storage_errors("delete", str(path)):
            # Checkpoints rely on it: the marker must be deleted before the rest.
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                fsync_path(path.parent)

    def delete_tree(self, name: str) -> None:
        """Deletes a folder recursively."""
        path = self._path(name)
        with storage_errors("delete", str(path)):
            if path.exists():
                shutil.rmtree(path)

    def _path(self, name: str) -> Path:
        return Path(self.root, self._require_inside(name))


class _CompleteWriter:
    """An unbuffered file whose `write` takes all bytes of a buffer."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        # The kernel limits one write to 2 GiB.
        while done < len(view):
            done += self._file.write(view[done:])
        return done


class _LocalInput:
    """Positioned reads straight into the caller's memory."""

    def __init__(self, file: FileIO, path: str) -> None:
        self._file = file
        self._path = path

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        # One call reads at most 2 GiB.
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
            if not count:
                end = offset + done
                lacking = len(buffer) - done
                cause = f"the file ends at byte {end}, {lacking} bytes too early"
                raise StorageError("read", self._path, cause)
            done += count


def _scan(folder: Path, prefix: str, recursive: bool) -> Iterator[Entry]:
    # Other processes may delete files during the listing (retention does), so files that
    # have vanished are skipped at every step.
    try:
        children = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for child in children:
        if child.name.endswith(PARTIAL_SUFFIX):
            continue
        name = prefix + child.name
        try:
            is_folder = child.is_dir()
            size = child.stat().st_size
        except FileNotFoundError:
            continue
        if not is_folder:
            yield Entry(name, False, size)
            continue
        yield Entry(name, True, 0)
        if recursive:
            yield from _scan(Path(child.path), f"{name}/", recursive)


class ObjectStorage(Storage):
    """A prefix of a bucket, or of any other filesystem that pyarrow opens.

    An object becomes visible when its put is complete.
    """

    def __init__(self, root: str, filesystem: fs.FileSystem, base: str) -> None:
        super().__init__(root)
        self.filesystem = filesystem
        self.base = base.rstrip("/")

    def read_bytes(self, name: str) -> bytes:
        """Returns the whole object."""
        with (
            storage_errors("read", self.uri(name)),
            self.filesystem.open_input_file(self._key(name)) as file,
        ):
            return bytes(file.read())

    @contextmanager
    def open_output(self, name: str) -> Iterator[Writable]:
        """Yields a stream; closing it makes the object visible."""
        key = self._key(name)
        with storage_errors("write", self.uri(name)):
            # Buckets have no folders, but other filesystems of pyarrow do.
            if not isinstance(self.filesystem, (fs.S3FileSystem, fs.GcsFileSystem)):
                self.filesystem.create_dir(key.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(key) as file:
                yield file

    @contextmanager
    def open_input(self, name: str) -> Iterator[Readable]:
        """Yields an object for range requests."""
        with (
            storage_errors("read", self.uri(name)),
            self.filesystem.open_input_file(self._key(name)) as file,
        ):
            yield _ObjectInput(file, self.uri(name))

    def exists(self, name: str) -> bool:
        """Returns whether an object, or one below that prefix, exists."""
        with storage_errors("look for", self.uri(name)):
            info = self.filesystem.get_file_info(self._key(name))
        return bool(info.type != fs.FileType.NotFound)

    def list(self, name: str = "", *, recursive: bool = False) -> list[Entry]:
        """Returns the entries below a prefix, sorted by name."""
        base = self.base
        if name:
            base = self._key(name)
        selector = fs.FileSelector(base, allow_not_found=True, recursive=recursive)
        with storage_errors("list", self.uri(name)):
            infos = self.filesystem.get_file_info(selector)
        entries = []
        # Paths start with the bucket.
        for info in infos:
            relative = info.path[len(base) + 1 :]
            is_folder = info.type == fs.FileType.Directory
            entries.append(Entry(relative, is_folder, info.size or 0))
        return sorted(entries, key=lambda entry: entry.name)

    def delete_file(self, name: str) -> None:
        """Deletes an object."""
        # Tested first, because only some filesystems raise for missing files.
        if self.exists(name):
            with storage_errors("delete", self.uri(name)):
                self.filesystem.delete_file(self._key(name))

    def delete_tree(self, name: str) -> None:
        """Deletes all objects below a prefix."""
        if self.exists(name):
            with storage_errors("delete", self.uri(name)):
                self.filesystem.delete_dir(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.base}/{self._require_inside(name)}"


class _ObjectInput:
    """Range requests into the caller's memory."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path

    def read_into(self, offset: int, buffer: memoryview) -> None:
        data = self._file.read_at(len(buffer), offset)  # type: ignore[attr-defined]
        if len(data) != len(buffer):
            end = offset + len(data)
            raise StorageError(
                "read", self._path, f"the object ends at byte {end}, too early"
            )
        buffer[:] = data
