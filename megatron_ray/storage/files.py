"""Reads, lists and uploads files at locations that users name.

Owns: single files and the folders of a data source; `storage` handles the files of a
job below one root. Must not know: the contents of files.
"""

import errno
import io
import lzma
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as arrow_fs

from megatron_ray.storage.errors import StorageError, storage_errors
from megatron_ray.storage.location import Location

_BUFFER_BYTES = 1 << 20
_UPLOAD_BYTES = 1 << 22


@dataclass(frozen=True)
class FileStat:
    """Size and time of a file, which identify its version without reading it."""

    path: str
    size: int
    mtime_ns: int


def file_stat(location: Location) -> FileStat | None:
    """Returns size and time of a file, or None when it does not exist.

    Raises StorageError when the storage does not answer.
    """
    info = _info(location)
    if info.type != arrow_fs.FileType.File:
        return None
    return _file_stat(info)


def is_folder(location: Location) -> bool:
    """Returns whether the location is an existing folder.

    Raises StorageError when the storage does not answer.
    """
    return bool(_info(location).type == arrow_fs.FileType.Directory)


def walk(folder: Location) -> Iterator[FileStat]:
    """Yields all files below a folder in arbitrary order, also those behind links.

    Raises StorageError when it cannot be listed.
    """
    if folder.is_local:
        yield from _walk_local(folder.path, (os.path.realpath(folder.path),))
        return
    # One listing for the whole tree; object stores return a thousand names per request.
    selector = arrow_fs.FileSelector(folder.path, recursive=True)
    with storage_errors("list", folder.path):
        infos = folder.filesystem.get_file_info(selector)
    for info in infos:
        if info.type == arrow_fs.FileType.File:
            yield _file_stat(info)


def _walk_local(folder: str, entered: tuple[str, ...]) -> Iterator[FileStat]:
    """Yields the files below a folder that was reached through the folders `entered`.

    Links back to one of those, which would never end, are not followed. Raises
    StorageError.
    """
    subfolders = []
    with storage_errors("list", folder), os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
                status = entry.stat()
            except OSError as error:
                # Links that lead nowhere or to themselves, and what was deleted meanwhile.
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                continue
            if is_folder:
                subfolders.append(entry.path)
            elif stat.S_ISREG(status.st_mode):
                yield FileStat(entry.path, status.st_size, status.st_mtime_ns)
    for subfolder in subfolders:
        target = os.path.realpath(subfolder)
        # The root of a disk has a folder that users may not read.
        if target not in entered and os.path.basename(target) != "lost+found":
            yield from _walk_local(subfolder, (*entered, target))


def broken_links(folder: Location) -> list[FileStat]:
    """Returns the symbolic links below a local folder whose targets do not exist.

    Listings leave them out. Empty for folders that are not local.
    """
    links: list[FileStat] = []
    if not folder.is_local:
        return links
    for parent, _, names in os.walk(folder.path):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.islink(path) and not os.path.exists(path):
                links.append(FileStat(path, 0, 0))
    return links


def file_identity(path: str) -> str:
    """Returns what is the same for all paths to a local file, through links of any kind.

    Raises OSError.
    """
    real_path = os.path.realpath(path)
    status = os.stat(real_path)
    # Only where needed, because some network filesystems give a file changing numbers.
    if status.st_nlink > 1:
        return f"{status.st_dev}:{status.st_ino}"
    return real_path


def split_repeated(files: Sequence[FileStat]) -> tuple[list[FileStat], list[FileStat]]:
    """Returns local files, and apart those that are other paths to earlier ones.

    Raises OSError.
    """
    distinct = []
    repeated = []
    first_paths: dict[tuple[int, int], str] = {}
    for file in files:
        # One cheap call for most files; a shared number alone is no proof.
        status = os.stat(file.path)
        first_path = first_paths.setdefault((status.st_dev, status.st_ino), file.path)
        if first_path == file.path or file_identity(first_path) != file_identity(file.path):
            distinct.append(file)
        else:
            repeated.append(file)
    return distinct, repeated


def open_stream(location: Location, compression: str | None = None) -> io.BufferedReader:
    """Opens a file for sequential reads.

    `compression` is the file's: Arrow's name, such as `gzip`, or `xz`; None reads the bytes
    as they are. Raises StorageError; reading raises OSError.
    """
    with storage_errors("read", location.path):
        if location.is_local and compression is None:
            return Path(location.path).open("rb")
        if compression == "xz":
            packed = location.filesystem.open_input_stream(location.path, compression=None)
            return io.BufferedReader(_XzFile(packed), _BUFFER_BYTES)
        # By default Arrow decompresses according to the file's suffix.
        stream = location.filesystem.open_input_stream(
            location.path, compression=compression
        )
        # Arrow's streams cannot read lines, so Python's buffer wraps them.
        return io.BufferedReader(stream, _BUFFER_BYTES)


class _XzFile(lzma.LZMAFile):
    """Unpacks a stream of xz, which Arrow does not read."""

    def __init__(self, packed: Any) -> None:
        super().__init__(packed)
        self._packed = packed

    def read(self, size: int | None = -1) -> bytes:
        """Returns at most `size` bytes, none at the end. Raises OSError."""
        try:
            return super().read(size)
        # EOFError: the file ends too early.
        except (lzma.LZMAError, EOFError) as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """Closes the packed stream too."""
        super().close()
        self._packed.close()


def open_random_access(location: Location) -> Any:
    """Opens a file as a pyarrow.NativeFile, which has `read_at(size, offset)`.

    Raises StorageError; reading raises OSError.
    """
    with storage_errors("read", location.path):
        return location.filesystem.open_input_file(location.path)


def read_bytes(location: Location) -> bytes:
    """Returns a whole small file.

    Raises StorageError; MissingFileError when it is not there.
    """
    with storage_errors("read", location.path), open_stream(location) as stream:
        return stream.read()


def upload(source: Path, target: Location) -> None:
    """Copies a local file to a location, in blocks. Raises StorageError."""
    filesystem = target.filesystem
    with storage_errors("write", target.path):
        filesystem.create_dir(str(Path(target.path).parent), recursive=True)
        with (
            source.open("rb") as reader,
            filesystem.open_output_stream(target.path, compression=None) as writer,
        ):
            while block := reader.read(_UPLOAD_BYTES):
                writer.write(block)


def check_writable(folder: Location) -> None:
    """Writes and deletes a small file in the folder.

    Creates no folder on a local disk: if the folder does not exist, the nearest
    existing parent is tested. Raises StorageError when it cannot be written.
    """
    # An object store has no folders, so any name below the prefix works.
    if folder.is_local:
        folder = _nearest_existing(folder)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    with storage_errors("write", probe.path):
        try:
            with probe.filesystem.open_output_stream(
                probe.path, compression=None
            ) as writer:
                writer.write(b"probe")
        finally:
            # Deleted also after a failed write, which may have left an empty file.
            if _info(probe).type != arrow_fs.FileType.NotFound:
                probe.filesystem.delete_file(probe.path)


def free_bytes(folder: Location) -> int | None:
    """Returns the free space of the disk that a folder is on, or will be on.

    None for object stores, which do not limit it. Raises StorageError.
    """
    if not folder.is_local:
        return None
    nearest = _nearest_existing(folder)
    with storage_errors("measure", nearest.path):
        return shutil.disk_usage(nearest.path).free


def _nearest_existing(folder: Location) -> Location:
    nearest = Path(folder.path)
    with storage_errors("write", folder.path):
        while not nearest.exists():
            nearest = nearest.parent
    if not nearest.is_dir():
        raise StorageError("write", folder.path, f"{nearest} is a file, not a folder")
    return Location(folder.filesystem, str(nearest), True)


def _info(location: Location) -> Any:
    with storage_errors("look for", location.path):
        return location.filesystem.get_file_info(location.path)


def _file_stat(info: Any) -> FileStat:
    return FileStat(info.path, int(info.size or 0), int(info.mtime_ns or 0))
