"""Files of a job on any storage.

Owns: paths and URIs to bytes, atomic and durable writes, one error type.

Local paths and `file://` go through the operating system (fsync, rename); `s3://` and
`gs://` through pyarrow.fs, where one put is atomic by itself. Torch-free. Must not
know: what the files mean.
"""

import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from pyarrow import ArrowException, fs

from megatron_ray.exceptions import ErrorKind, MegatronRayError

_PARTIAL = ".partial"
_SCHEMES = ("file", "s3", "gs", "gcs")


class StorageError(MegatronRayError):
    """An operation on storage failed; the text names operation, path and cause."""

    failure_kind = ErrorKind.STORAGE

    def __init__(self, operation: str, path: str, cause: object) -> None:
        super().__init__(f"cannot {operation} {path}: {cause}")
        self.operation = operation
        self.path = path
        self.cause = str(cause)

    def __reduce__(self) -> tuple[type["StorageError"], tuple[str, str, str]]:
        return type(self), (self.operation, self.path, self.cause)


class MissingFileError(StorageError):
    """There is nothing at the path."""


class Writable(Protocol):
    """What `open_output` yields; `write` takes any contiguous buffer."""

    def write(self, data: Any, /) -> int | None: ...


class Readable(Protocol):
    """What `open_input` yields: positioned reads over a file of known size."""

    def read_into(self, offset: int, buffer: memoryview) -> None: ...


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
        """The root joined with a name: accepted by `open_storage`, meant for people
        too.
        """
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """The whole file. Raises MissingFileError when there is none."""

    def write_bytes_atomic(self, name: str, data: bytes) -> None:
        """Writes the file whole or not at all, durable on return; makes parent folders."""
        with self.open_output(name) as file:
            file.write(data)

    @abstractmethod
    def open_output(self, name: str) -> AbstractContextManager[Writable]:
        """Context manager yielding a Writable; the file appears, durable, at a normal
        exit and (locally) never otherwise.
        """

    @abstractmethod
    def open_input(self, name: str) -> AbstractContextManager[Readable]:
        """Context manager yielding a Readable.

        Raises MissingFileError when there is no such file.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file or folder is there."""

    @abstractmethod
    def list(self, name: str = "", *, recursive: bool = False) -> list[Entry]:
        """Entries of a folder, sorted by name; empty when it does not exist.

        Unfinished writes are left out.
        """

    @abstractmethod
    def delete_file(self, name: str) -> None:
        """Deletes a file; nothing happens when there is none."""

    @abstractmethod
    def delete_tree(self, name: str) -> None:
        """Deletes a folder with all below it; nothing happens when there is none.

        Refuses the root itself.
        """

    def _inside(self, name: str) -> str:
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise StorageError(
                "use",
                f"{name!r} under {self.root}",
                "a name inside the storage root is needed",
            )
        return name


def open_storage(path: str) -> Storage:
    """Storage rooted at a local path or a URI. Raises StorageError for a scheme or URI
    that is not understood.
    """
    scheme = path.partition("://")[0] if "://" in path else ""
    if not scheme:
        return LocalStorage(os.path.abspath(path))
    if scheme not in _SCHEMES:
        raise StorageError(
            "open",
            path,
            f"unknown scheme {scheme!r}; use a local path or one of "
            f"{', '.join(s + '://' for s in _SCHEMES)}",
        )
    if scheme == "file":
        return LocalStorage(_path_of_file_uri(path))
    try:
        filesystem, root = fs.FileSystem.from_uri(path)
    except (OSError, ArrowException, ValueError) as error:
        raise StorageError("open", path, error) from error
    if not root.strip("/"):
        raise StorageError("open", path, "the URI names no bucket")
    return ObjectStorage(path, filesystem, root)


def _path_of_file_uri(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise StorageError(
            "open",
            uri,
            "a file URI has three slashes and an absolute path, as in file:///data/jobs",
        )
    return unquote(parts.path)


@contextmanager
def _translated(operation: str, path: str) -> Iterator[None]:
    """Turns what the operating system and Arrow raise into StorageError."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(operation, path, "no such file or folder") from error
    except OSError as error:
        raise StorageError(operation, path, error.strerror or error) from error
    except ArrowException as error:
        raise StorageError(operation, path, error) from error


class LocalStorage(Storage):
    """A folder of this machine or of a shared filesystem."""

    def read_bytes(self, name: str) -> bytes:
        path = self._path(name)
        with _translated("read", str(path)):
            return path.read_bytes()

    @contextmanager
    def open_output(self, name: str) -> Iterator[Writable]:
        path = self._path(name)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        with _translated("write", str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(partial, "wb", buffering=0)  # noqa: SIM115 - closed below, before the rename
        try:
            with _translated("write", str(path)), file:
                yield _WholeWrites(file)
                os.fsync(file.fileno())
            with _translated("write", str(path)):
                partial.replace(path)
                _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def open_input(self, name: str) -> Iterator[Readable]:
        path = self._path(name)
        with _translated("read", str(path)), open(path, "rb", buffering=0) as file:
            yield _LocalInput(file, str(path))

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def list(self, name: str = "", *, recursive: bool = False) -> list[Entry]:
        folder = self._path(name) if name else Path(self.root)
        with _translated("list", str(folder)):
            return (
                sorted(_walk(folder, "", recursive), key=lambda entry: entry.name)
                if folder.is_dir()
                else []
            )

    def delete_file(self, name: str) -> None:
        path = self._path(name)
        with _translated("delete", str(path)):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)

    def delete_tree(self, name: str) -> None:
        path = self._path(name)
        with _translated("delete", str(path)):
            if path.exists():
                shutil.rmtree(path)

    def _path(self, name: str) -> Path:
        return Path(self.root, self._inside(name))


class _WholeWrites:
    """An unbuffered file whose `write` returns only when all bytes are with the kernel
    (which cuts writes at 2 GiB).
    """

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self.file.write(view[done:])
        return done


class _LocalInput:
    """Positioned reads straight into the caller's memory."""

    def __init__(self, file: Any, path: str) -> None:
        self.file = file
        self.path = path

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.file.fileno(), [buffer[done:]], offset + done)
            if not count:
                raise StorageError(
                    "read",
                    self.path,
                    f"the file ends at byte {offset + done}, {len(buffer) - done} bytes too early",
                )
            done += count


def _walk(folder: Path, prefix: str, recursive: bool) -> Iterator[Entry]:
    """What is deleted by another process meanwhile is simply not there."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for found in entries:
        if found.name.endswith(_PARTIAL):
            continue
        try:
            is_folder = found.is_dir()
            size = found.stat().st_size
        except FileNotFoundError:
            continue
        yield Entry(prefix + found.name, is_folder, 0 if is_folder else size)
        if recursive and is_folder:
            yield from _walk(Path(found.path), f"{prefix}{found.name}/", recursive)


def _sync_folder(folder: Path) -> None:
    """Makes a rename or an unlink survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStorage(Storage):
    """A prefix of a bucket (or any other filesystem that pyarrow opens); an object
    appears when its put is complete.
    """

    def __init__(self, root: str, filesystem: fs.FileSystem, base: str) -> None:
        super().__init__(root)
        self.filesystem = filesystem
        self.base = base.rstrip("/")

    def read_bytes(self, name: str) -> bytes:
        with (
            _translated("read", self.uri(name)),
            self.filesystem.open_input_file(self._key(name)) as file,
        ):
            return bytes(file.read())

    @contextmanager
    def open_output(self, name: str) -> Iterator[Writable]:
        key = self._key(name)
        with _translated("write", self.uri(name)):
            # Buckets have no folders; filesystems behind the same interface do.
            if not isinstance(self.filesystem, (fs.S3FileSystem, fs.GcsFileSystem)):
                self.filesystem.create_dir(key.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(key) as file:
                yield file

    @contextmanager
    def open_input(self, name: str) -> Iterator[Readable]:
        with (
            _translated("read", self.uri(name)),
            self.filesystem.open_input_file(self._key(name)) as file,
        ):
            yield _ObjectInput(file, self.uri(name))

    def exists(self, name: str) -> bool:
        with _translated("look for", self.uri(name)):
            return bool(
                self.filesystem.get_file_info(self._key(name)).type != fs.FileType.NotFound
            )

    def list(self, name: str = "", *, recursive: bool = False) -> list[Entry]:
        base = self._key(name) if name else self.base
        with _translated("list", self.uri(name)):
            found = self.filesystem.get_file_info(
                fs.FileSelector(base, allow_not_found=True, recursive=recursive)
            )
        entries = [
            Entry(
                info.path[len(base) + 1 :],
                info.type == fs.FileType.Directory,
                info.size or 0,
            )
            for info in found
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def delete_file(self, name: str) -> None:
        if self.exists(name):
            with _translated("delete", self.uri(name)):
                self.filesystem.delete_file(self._key(name))

    def delete_tree(self, name: str) -> None:
        if self.exists(name):
            with _translated("delete", self.uri(name)):
                self.filesystem.delete_dir(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.base}/{self._inside(name)}"


class _ObjectInput:
    """Range requests into the caller's memory."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file = file
        self.path = path

    def read_into(self, offset: int, buffer: memoryview) -> None:
        data = self.file.read_at(len(buffer), offset)  # type: ignore[attr-defined]
        if len(data) != len(buffer):
            raise StorageError(
                "read",
                self.path,
                f"the object ends at byte {offset + len(data)}, too early",
            )
        buffer[:] = data
