"""Finds the files of each data source.

Owns: listing files, globs. Must not know: the contents of files, caches, the meaning of
names.
"""

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from megatron_ray.config.data import DataSource
from megatron_ray.data.mock import NUM_PARTS, PART_BYTES
from megatron_ray.data.preparation.errors import DataError, read_errors, short_cause
from megatron_ray.data.preparation.file_selection import (
    Role,
    Selection,
    named_files,
    select_files,
)
from megatron_ray.data.preparation.formats.suffixes import TYPES, file_format, remedy_of
from megatron_ray.storage.errors import InvalidLocationError
from megatron_ray.storage.files import (
    FileStat,
    broken_links,
    file_stat,
    is_folder,
    split_repeated,
    walk,
)
from megatron_ray.storage.location import Location, parse_location

STDLIB = "builtin://python-stdlib"
MOCK = "builtin://mock"

_REMEDY = (
    "give .txt, .jsonl, .parquet or .arrow files (text and lines also as .gz, .zst, .bz2 or "
    ".xz), a "
    "folder or glob of them, the prefix of prepared .bin/.idx files, or " + STDLIB
)
_SKIPPED_STDLIB_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_WILDCARDS = "*?["


@dataclass(frozen=True)
class SourceFiles:
    """A source and its existing files."""

    source: DataSource
    kind: Literal["text", "builtin", "prepared"]
    root: Location
    """The source's path; for `prepared` the prefix, for `builtin` the folder."""
    files: tuple[FileStat, ...]
    """Files of the source in reading order."""
    validation_files: tuple[FileStat, ...] = ()
    """Files beside them that are named as validation data."""
    notes: tuple[str, ...] = ()
    """Sentences about files of the path that are left out."""

    @property
    def is_named(self) -> bool:
        """Whether the path is that of the files themselves: no folder and no pattern."""
        return self.kind != "text" or self.files[0].path == self.root.path

    @property
    def folder(self) -> str:
        """The folder to which names in messages are relative."""
        return _fixed_folder(self.root).path

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def location(self, file: FileStat) -> Location:
        """Returns where one of the files is."""
        return Location(self.root.filesystem, file.path, self.root.is_local)


def find_source(source: DataSource, role: Role = "train") -> SourceFiles:
    """Lists a source's files without reading them.

    `role` is the use of its text, on which depends what a folder or pattern stands for.
    Raises DataError when there are no files or their type is unknown.
    """
    with read_errors(source.path):
        if source.path.startswith("builtin://"):
            return _find_builtin(source)
        try:
            root = parse_location(source.path)
        except InvalidLocationError as error:
            detail = (
                f"{source.path} is not a valid path or URI: {short_cause(error)}; {_REMEDY}"
            )
            raise DataError("bad_uri", detail) from error
        file = file_stat(root)
        if file is not None:
            return _find_file(source, root, file)
        if is_folder(root):
            return _find_in_folder(source, root, role)
        # Tested last, so that an existing file with a bracket in its name is not a pattern.
        if _has_wildcard(root.path):
            return _find_matching(source, root, role)
        return _find_prepared(source, root)


def _find_file(source: DataSource, root: Location, file: FileStat) -> SourceFiles:
    # The path may be either file of the pair instead of their prefix.
    if root.path.endswith((".bin", ".idx")):
        prefix = Location(root.filesystem, root.path[:-4], root.is_local)
        return _find_prepared(source, prefix)
    if file_format(file.path) is None:
        raise _unknown_type(file)
    return _text_files(source, root, Selection([file], [], []))


def _unknown_type(file: FileStat) -> DataError:
    remedy = _REMEDY
    specific = remedy_of(file.path)
    if specific is not None:
        remedy = f"{specific}; {_REMEDY}"
    detail = f"{file.path} is of a type that cannot be read; {remedy}"
    return DataError("file_type", detail)


def _find_in_folder(source: DataSource, folder: Location, role: Role) -> SourceFiles:
    files = list(walk(folder))
    broken = broken_links(folder)
    _require_targets(source, folder, broken)
    selection = select_files(source.path, folder.path, files, role, is_folder=True)
    if broken:
        # A folder of data may have been behind one, on a disk that is not mounted.
        names = named_files(broken, folder.path)
        selection.notes.append(f"{source.path}: {names} linked to nothing: not read")
    if not selection.files:
        detail = f"the folder {source.path} holds no {TYPES} file; {_REMEDY}"
        raise DataError("no_files", detail)
    return _text_files(source, folder, selection)


def _require_targets(
    source: DataSource, folder: Location, broken: Sequence[FileStat]
) -> None:
    """Raises DataError when one of the broken links is named like data."""
    data = [file for file in broken if file_format(file.path) is not None]
    if data:
        detail = (
            f"{source.path} has links to data that do not exist: "
            f"{named_files(data, folder.path)}; restore the data or remove the links"
        )
        raise DataError("not_found", detail)


def _find_matching(source: DataSource, root: Location, role: Role) -> SourceFiles:
    base = _fixed_folder(root)
    files: list[FileStat] = []
    if is_folder(base):
        files = _matching(walk(base), root.path)
        _require_targets(source, base, _matching(broken_links(base), root.path))
    if not files:
        detail = f"no file matches {source.path} where the job runs; check the pattern"
        raise DataError("not_found", detail)
    selection = select_files(source.path, base.path, files, role, is_folder=False)
    if not selection.files:
        raise _unknown_type(files[0])
    return _text_files(source, root, selection)


def _find_builtin(source: DataSource) -> SourceFiles:
    if source.path == MOCK:
        parts = []
        for part in range(NUM_PARTS):
            parts.append(FileStat(f"{MOCK}/{part}", PART_BYTES, 0))
        return SourceFiles(source, "builtin", parse_location("/"), tuple(parts))
    if source.path != STDLIB:
        detail = f"{source.path} is not a builtin corpus; there are {STDLIB} and {MOCK}"
        raise DataError("unknown_builtin", detail)
    # The sources of the running Python, available on every machine.
    folder = Path(sysconfig.get_path("stdlib"))
    files = []
    for parent, subfolders, names in os.walk(folder):
        # In place, because os.walk descends into the remaining folders.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_STDLIB_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                files.append(_local_stat(Path(parent, name)))
    if not files:
        detail = (
            f"this Python keeps no sources of its standard library in {folder}; give another "
            "path"
        )
        raise DataError("no_files", detail)
    return SourceFiles(source, "builtin", parse_location(str(folder)), _by_path(files))


def _local_stat(path: Path) -> FileStat:
    info = path.stat()
    return FileStat(str(path), info.st_size, info.st_mtime_ns)


def _find_prepared(source: DataSource, prefix: Location) -> SourceFiles:
    # The prefix itself is not a file, so both files are tested.
    index = file_stat(prefix.with_suffix(".idx"))
    tokens = file_stat(prefix.with_suffix(".bin"))
    if index is None and tokens is None:
        detail = (
            f"{source.path} does not exist where the job runs; check the path, or mount it "
            f"there; {_REMEDY}"
        )
        raise DataError("not_found", detail)
    if index is not None and tokens is not None:
        return SourceFiles(source, "prepared", prefix, (index, tokens))
    missing = ".bin"
    if index is None:
        missing = ".idx"
    detail = (
        f"{prefix.path}{missing} is missing beside its neighbour; prepared data need both "
        "files"
    )
    raise DataError("incomplete_prefix", detail)


def _has_wildcard(path: str) -> bool:
    return any(wildcard in path for wildcard in _WILDCARDS)


def _fixed_folder(root: Location) -> Location:
    """Returns the last folder of a pattern without a wildcard; matches are below it."""
    fixed = []
    for pattern in PurePosixPath(root.path).parts:
        if _has_wildcard(pattern):
            break
        fixed.append(pattern)
    path = ""
    if fixed:
        path = str(PurePosixPath(*fixed))
    return Location(root.filesystem, path, root.is_local)


def _matching(files: Iterable[FileStat], pattern: str) -> list[FileStat]:
    patterns = PurePosixPath(pattern).parts
    return [file for file in files if _matches(PurePosixPath(file.path).parts, patterns)]


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Matches each component, as a shell does; `**` is any number of folders."""
    if not patterns:
        return not parts
    # First `**` as no folder, then as one or more folders.
    if patterns[0] == "**" and _matches(parts, patterns[1:]):
        return True
    if not parts:
        return False
    if patterns[0] == "**":
        return _matches(parts[1:], patterns)
    if not fnmatch.fnmatchcase(parts[0], patterns[0]):
        return False
    return _matches(parts[1:], patterns[1:])


def _text_files(source: DataSource, root: Location, selection: Selection) -> SourceFiles:
    files = selection.files
    notes = selection.notes
    if root.is_local:
        # Links may lead to the same files, and those in a circle many times.
        by_depth = sorted(files, key=lambda file: (file.path.count("/"), file.path))
        files, repeated = split_repeated(by_depth)
        if repeated:
            names = named_files(repeated, _fixed_folder(root).path)
            notes = [*notes, f"{source.path}: {names} linked to others: read once"]
    if not sum(file.size for file in files):
        detail = f"{source.path} is empty; give files with text in them"
        raise DataError("empty", detail)
    return SourceFiles(
        source,
        "text",
        root,
        _by_path(files),
        _by_path(selection.validation),
        tuple(notes),
    )


def _by_path(files: list[FileStat]) -> tuple[FileStat, ...]:
    # Filesystems list in arbitrary order, on which the corpus must not depend.
    return tuple(sorted(files, key=lambda file: file.path))


def in_sampling_order(source_files: SourceFiles) -> list[FileStat]:
    """Returns the files in an order unrelated to their names, the same every time.

    The first files are thus a representative sample.
    """

    def name_hash(file: FileStat) -> bytes:
        name = file.path.removeprefix(source_files.root.path)
        return hashlib.sha256(name.encode()).digest()

    return sorted(source_files.files, key=name_hash)
