"""Local paths and URIs behind one face.

Owns: pyarrow filesystems for data. Must not know: what the files hold.
"""

import errno
import io
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs as arrow_fs

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """A filesystem and a path in it."""

    filesystem: Any
    path: str
    local: bool
    """True when `path` is a plain path of this machine, which memory mapping, links and
    renames need."""

    def __truediv__(self, name: str) -> "Place":
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}", self.local)

    def with_suffix(self, suffix: str) -> "Place":
        """The neighbour whose name is this one's plus `suffix`."""
        return Place(self.filesystem, self.path + suffix, self.local)


@dataclass(frozen=True)
class FileStat:
    """What identifies a version of a file without reading it."""

    path: str
    size: int
    mtime_ns: int


def is_local(path: str) -> bool:
    """True for a plain path and for file:// URIs."""
    return "://" not in path or path.startswith("file://")


def place(path: str) -> Place:
    """Where a path or URI is.

    Raises ValueError when the scheme is unknown or the URI is malformed, OSError
    without credentials.
    """
    if not is_local(path):
        filesystem, inner = _from_uri(path)
        return Place(filesystem, inner, False)
    plain = unquote(urlsplit(path).path) if path.startswith("file://") else path
    if not plain or "\0" in plain:
        raise ValueError("the path is empty or holds a NUL character")
    try:
        return Place(
            arrow_fs.LocalFileSystem(), str(Path(plain).expanduser().absolute()), True
        )
    except RuntimeError as error:
        raise ValueError(f"the home folder in {plain} is not known") from error


def stat(where: Place) -> FileStat | None:
    """Size and time of a file; None when there is no file of that name.

    Raises OSError when it cannot be asked.
    """
    info = where.filesystem.get_file_info(where.path)
    return _file_stat(info) if info.type == arrow_fs.FileType.File else None


def is_folder(where: Place) -> bool:
    """True when it is an existing folder. Raises OSError when it cannot be asked."""
    return bool(
        where.filesystem.get_file_info(where.path).type == arrow_fs.FileType.Directory
    )


def exists(where: Place) -> bool:
    """True for a file or a folder. Raises OSError when it cannot be asked."""
    return bool(
        where.filesystem.get_file_info(where.path).type != arrow_fs.FileType.NotFound
    )


def walk(folder: Place) -> Iterator[FileStat]:
    """All files below a folder, in no order.

    Raises OSError when it cannot be listed.
    """
    for info in folder.filesystem.get_file_info(
        arrow_fs.FileSelector(folder.path, recursive=True)
    ):
        if info.type == arrow_fs.FileType.File:
            yield _file_stat(info)


def open_stream(where: Place) -> IO[bytes]:
    """A file's bytes from the start, undecoded. Raises OSError."""
    if where.local:
        return Path(where.path).open("rb")
    # Arrow's streams cannot read lines; Python's buffer over them can.
    return io.BufferedReader(
        where.filesystem.open_input_stream(where.path, compression=None), _BUFFER_BYTES
    )


def read_bytes(where: Place) -> bytes:
    """A whole small file. Raises OSError (FileNotFoundError when it is not there)."""
    with open_stream(where) as stream:
        return stream.read()


def upload(source: Path, target: Place) -> None:
    """Copies a local file to a place, streaming. Raises OSError."""
    target.filesystem.create_dir(str(Path(target.path).parent), recursive=True)
    with (
        source.open("rb") as reader,
        target.filesystem.open_output_stream(target.path, compression=None) as writer,
    ):
        while block := reader.read(1 << 22):
            writer.write(block)


def probe_writable(where: Place) -> None:
    """Writes and deletes a small file there, or in the nearest folder above that
    exists.

    Raises OSError when it cannot.
    """
    folder = where
    if where.local:
        nearest = Path(where.path)
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(nearest))
        folder = Place(where.filesystem, str(nearest), True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.filesystem.open_output_stream(probe.path, compression=None) as writer:
            writer.write(b"probe")
    finally:
        if exists(probe):
            probe.filesystem.delete_file(probe.path)


def _from_uri(uri: str) -> tuple[Any, str]:
    filesystem, path = arrow_fs.FileSystem.from_uri(uri)
    return filesystem, path


def _file_stat(info: Any) -> FileStat:
    return FileStat(info.path, int(info.size or 0), int(info.mtime_ns or 0))
