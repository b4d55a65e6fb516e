"""Parses paths and URIs.

Owns: the only parser of users' paths. Must not know: the contents of files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pyarrow import ArrowException
from pyarrow import fs as arrow_fs

from megatron_ray.storage.errors import InvalidLocationError, StorageError

_FILE_SCHEME = "file://"


@dataclass(frozen=True)
class Location:
    """A path in a filesystem of pyarrow."""

    filesystem: Any
    path: str
    is_local: bool
    """Whether `path` is a local path, which memory mapping, links and renames
    require."""

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", self.is_local)

    def with_suffix(self, suffix: str) -> "Location":
        """Returns the location with `suffix` appended to the name."""
        return Location(self.filesystem, self.path + suffix, self.is_local)


def is_local_path(path: str) -> bool:
    """Returns True for a plain path and for file:// URIs."""
    return "://" not in path or path.startswith(_FILE_SCHEME)


def parse_location(path: str) -> Location:
    """Parses a local path, a file:// URI, or a URI of any scheme of pyarrow.

    Raises InvalidLocationError when it is malformed or has an unknown scheme, and
    StorageError when the filesystem cannot be opened, e.g. without credentials.
    """
    if is_local_path(path):
        return Location(arrow_fs.LocalFileSystem(), _local_path(path), True)
    # Does not connect yet, but S3 and GCS search for credentials.
    try:
        filesystem, inner_path = _filesystem_of(path)
    except (ArrowException, ValueError) as error:
        raise InvalidLocationError("open", path, error) from error
    except OSError as error:
        raise StorageError("open", path, error) from error
    return Location(filesystem, inner_path, False)


def _local_path(path: str) -> str:
    plain = path
    if path.startswith(_FILE_SCHEME):
        # file://host/share is a path on another machine.
        uri = urlsplit(path)
        if uri.netloc not in ("", "localhost"):
            cause = (
                "a file URI has three slashes and an absolute path, as in file:///data/jobs"
            )
            raise InvalidLocationError("open", path, cause)
        plain = unquote(uri.path)
    if not plain or "\0" in plain:
        cause = "the path is empty or holds a NUL character"
        raise InvalidLocationError("open", path, cause)
    # Absolute, because processes of a job have different working directories; `..` is kept,
    # because paths are part of cache keys.
    try:
        return str(Path(plain).expanduser().absolute())
    except RuntimeError as error:
        cause = f"the home folder in {plain} is not known"
        raise InvalidLocationError("open", path, cause) from error


def _filesystem_of(uri: str) -> tuple[Any, str]:
    filesystem, path = arrow_fs.FileSystem.from_uri(uri)
    return filesystem, path
