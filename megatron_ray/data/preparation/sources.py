"""Finds the files of each data source.

Owns: listing files, globs. Must not know: the contents of files, caches.
"""

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from megatron_ray.config.data import DataConfig, DataSource
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.errors import DataError, read_errors, short_cause
from megatron_ray.storage.errors import InvalidLocationError
from megatron_ray.storage.files import FileStat, file_stat, is_folder, walk
from megatron_ray.storage.location import Location, parse_location

STDLIB = "builtin://python-stdlib"

_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_REMEDY = (
    "give .txt, .jsonl or .parquet files, a folder or glob of them, the prefix of prepared "
    ".bin/.idx files, or " + STDLIB
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

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def location(self, file: FileStat) -> Location:
        """Returns where one of the files is."""
        return Location(self.root.filesystem, file.path, self.root.is_local)


SourceAt = tuple[str, SourceFiles]
"""The JSON pointer of a source in the spec, and its files."""


@dataclass(frozen=True)
class DataFiles:
    """The files of all sources of a config, and a problem for each source without files."""

    train: list[SourceAt]
    validation: list[SourceAt]
    problems: list[Problem]


def find_data(data: DataConfig, weights: ModelTokenizer | None = None) -> DataFiles:
    """Finds the files of every source; a source without files is a problem.

    `weights` is the tokenizer of the weights that the run begins with, if any.
    """
    problems: list[Problem] = []
    train = _find_each(data.train, "/data/train", problems)
    validation = _find_each(data.validation, "/data/validation", problems)
    # Prepared tokens determine the vocabulary.
    prepared_at = _first_prepared(train + validation)
    is_trained = data.tokenizer.kind == "bpe" and weights is None
    if prepared_at is not None and is_trained:
        detail = (
            f"{prepared_at}/path is already tokenized and a tokenizer trained now would not "
            "fit; use kind `file` with the one it was made with"
        )
        problems.append(Problem("/data/tokenizer/kind", "tokenizer_needed", detail))
    return DataFiles(train, validation, problems)


def _find_each(
    sources: Sequence[DataSource], pointer: str, problems: list[Problem]
) -> list[SourceAt]:
    sources_at = []
    for number, source in enumerate(sources):
        source_pointer = f"{pointer}/{number}"
        try:
            sources_at.append((source_pointer, find_source(source)))
        except DataError as error:
            problems.append(error.problem(source_pointer))
    return sources_at


def _first_prepared(sources_at: Sequence[SourceAt]) -> str | None:
    for pointer, source in sources_at:
        if source.kind == "prepared":
            return pointer
    return None


def find_source(source: DataSource) -> SourceFiles:
    """Lists a source's files without reading them.

    Raises DataError when there are none or their type is unknown.
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
            return _text_files(source, root, _readable_files(source, root))
        # Tested last, so that an existing file with a bracket in its name is not a pattern.
        if _has_wildcard(root.path):
            return _text_files(source, root, _glob(root))
        return _find_prepared(source, root)


def _find_file(source: DataSource, root: Location, file: FileStat) -> SourceFiles:
    # The path may be either file of the pair instead of their prefix.
    if root.path.endswith((".bin", ".idx")):
        prefix = Location(root.filesystem, root.path[:-4], root.is_local)
        return _find_prepared(source, prefix)
    return _text_files(source, root, [file])


def _find_builtin(source: DataSource) -> SourceFiles:
    if source.path != STDLIB:
        detail = f"{source.path} is not a builtin corpus; the only one is {STDLIB}"
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


def _readable_files(source: DataSource, folder: Location) -> list[FileStat]:
    files = []
    for file in walk(folder):
        if suffix_of(file.path) in _TEXT_SUFFIXES and not _is_hidden(
            file.path, folder.path
        ):
            files.append(file)
    if not files:
        types = ", ".join(_TEXT_SUFFIXES)
        detail = f"the folder {source.path} holds no {types} file; {_REMEDY}"
        raise DataError("no_files", detail)
    return files


def _is_hidden(path: str, root: str) -> bool:
    # Relative to the source, because its parent folders may be hidden.
    parts = PurePosixPath(path.removeprefix(root)).parts
    for part in parts:
        # `_` as in Spark's _SUCCESS and _logs.
        if part.startswith((".", "_")):
            return True
    return False


def _has_wildcard(path: str) -> bool:
    return any(wildcard in path for wildcard in _WILDCARDS)


def _glob(root: Location) -> list[FileStat]:
    patterns = PurePosixPath(root.path).parts
    # Matches are below the last folder without a wildcard.
    fixed = []
    for pattern in patterns:
        if _has_wildcard(pattern):
            break
        fixed.append(pattern)
    base_path = ""
    if fixed:
        base_path = str(PurePosixPath(*fixed))
    base = Location(root.filesystem, base_path, root.is_local)
    if not is_folder(base):
        return []
    matching = []
    for file in walk(base):
        if _matches(PurePosixPath(file.path).parts, patterns):
            matching.append(file)
    return matching


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


def _text_files(source: DataSource, root: Location, files: list[FileStat]) -> SourceFiles:
    if not files:
        detail = f"no file matches {source.path} where the job runs; check the pattern"
        raise DataError("not_found", detail)
    num_bytes = 0
    for file in files:
        num_bytes += file.size
        if suffix_of(file.path) not in _TEXT_SUFFIXES:
            detail = f"{file.path} is of a type that cannot be read; {_REMEDY}"
            raise DataError("file_type", detail)
    if not num_bytes:
        detail = f"{source.path} is empty; give files with text in them"
        raise DataError("empty", detail)
    return SourceFiles(source, "text", root, _by_path(files))


def _by_path(files: list[FileStat]) -> tuple[FileStat, ...]:
    # Filesystems list in arbitrary order, on which the corpus must not depend.
    return tuple(sorted(files, key=lambda file: file.path))


def suffix_of(path: str) -> str:
    """Returns the suffix of a path in lower case, with its dot."""
    return PurePosixPath(path).suffix.lower()


def in_sampling_order(source_files: SourceFiles) -> list[FileStat]:
    """Returns the files in an order unrelated to their names, the same every time.

    The first files are thus a representative sample.
    """

    def name_hash(file: FileStat) -> bytes:
        name = file.path.removeprefix(source_files.root.path)
        return hashlib.sha256(name.encode()).digest()

    return sorted(source_files.files, key=name_hash)
