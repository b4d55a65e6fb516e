"""Text from wherever it lies.

Owns: naming, listing and reading sources. Must not know: tokens, splits, caches.
"""

import fnmatch
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ray.config.data import DataConfig, DataSource
from megatron_ray.config.problem import Problem
from megatron_ray.exceptions import InputError
from megatron_ray.storage.files import (
    FileStat,
    Place,
    is_folder,
    open_stream,
    place,
    stat,
    walk,
)

STDLIB = "builtin://python-stdlib"

_READABLE = (".txt", ".jsonl", ".parquet")
_WANTED = (
    "give .txt, .jsonl or .parquet files, a folder or glob of them, the prefix of prepared "
    ".bin/.idx files, or " + STDLIB
)
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_WILD = "*?["
_PIECE_CHARS = 1 << 18


class DataError(InputError):
    """A user's mistake in one field, before it is known which entry of the spec it was
    in.
    """

    def __init__(self, code: str, detail: str, field: str = "path") -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field

    def problem(self, owner: str) -> Problem:
        """As a problem of the field below JSON pointer `owner`."""
        return Problem(f"{owner}/{self.field}", self.code, self.detail)


class Piece(NamedTuple):
    """Text of a document, in order; a long document is several pieces so that none is
    ever whole in memory.
    """

    text: str
    ends_document: bool


@dataclass(frozen=True)
class FoundSource:
    """A source whose files are known to exist."""

    source: DataSource
    kind: Literal["text", "builtin", "prepared"]
    root: Place
    """Filesystem of the files; for `prepared` the prefix, for `builtin` the folder."""
    files: tuple[FileStat, ...]
    """In reading order."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class FoundData:
    """All sources of a config, each with its JSON pointer, and what is wrong with those
    that are missing here.
    """

    train: list[tuple[str, FoundSource]]
    validation: list[tuple[str, FoundSource]]
    problems: list[Problem]


def find_all(data: DataConfig) -> FoundData:
    """Finds every source; what cannot be found becomes a problem."""
    result = FoundData([], [], [])
    for name, sources, found in (
        ("train", data.train, result.train),
        ("validation", data.validation, result.validation),
    ):
        for number, source in enumerate(sources):
            owner = f"/data/{name}/{number}"
            try:
                found.append((owner, find(source)))
            except DataError as error:
                result.problems.append(error.problem(owner))
    ready = next(
        (
            owner
            for owner, source in result.train + result.validation
            if source.kind == "prepared"
        ),
        None,
    )
    if ready and data.tokenizer.kind == "bpe":
        text = (
            f"{ready}/path is already tokenized and a tokenizer trained now would not fit; use "
            "kind `file` with the one it was made with"
        )
        result.problems.append(Problem("/data/tokenizer/kind", "tokenizer_needed", text))
    return result


def find(source: DataSource) -> FoundSource:
    """Lists a source's files without reading them.

    Raises DataError when there are none or they are of no known type.
    """
    with _readable(source.path):
        if source.path.startswith("builtin://"):
            return _find_builtin(source)
        try:
            root = place(source.path)
        except (ValueError, pa.ArrowException) as error:
            raise DataError(
                "bad_uri",
                f"{source.path} cannot be understood: {_first_line(error)}; {_WANTED}",
            ) from error
        found = stat(root)
        if found is not None and root.path.endswith((".bin", ".idx")):
            return _find_prepared(
                source, Place(root.filesystem, root.path[:-4], root.local)
            )
        if found is not None:
            return FoundSource(source, "text", root, _checked(source, [found]))
        if is_folder(root):
            files = [
                file
                for file in walk(root)
                if _suffix(file.path) in _READABLE and not _hidden(file.path, root.path)
            ]
            if not files:
                raise DataError(
                    "no_files",
                    f"the folder {source.path} holds no {', '.join(_READABLE)} file; {_WANTED}",
                )
            return FoundSource(source, "text", root, _checked(source, files))
        if any(mark in root.path for mark in _WILD):
            return FoundSource(source, "text", root, _checked(source, _glob(root)))
        return _find_prepared(source, root)


def fingerprint(found: FoundSource) -> str:
    """Changes when the content may have: names, sizes and times; for the builtin corpus
    the content itself, on any machine alike.
    """
    parts: list[object] = [found.kind, found.source.text_key]
    if found.kind == "builtin":
        parts += [[piece.text for piece in pieces(found)]]
    else:
        parts += [[file.path, file.size, file.mtime_ns] for file in found.files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def pieces(found: FoundSource) -> Iterator[Piece]:
    """All documents, in file order.

    Raises DataError that names the file, and the line where there are lines.
    """
    for file in found.files:
        yield from file_pieces(found, file)


def file_pieces(found: FoundSource, file: FileStat) -> Iterator[Piece]:
    """The documents of one file. Empty documents are left out. Raises DataError."""
    where = Place(found.root.filesystem, file.path, found.root.local)
    key = found.source.text_key
    with _readable(file.path):
        if found.kind == "builtin":
            yield from _builtin_pieces(Path(file.path))
        elif _suffix(file.path) == ".jsonl":
            yield from _jsonl_pieces(where, key)
        elif _suffix(file.path) == ".parquet":
            yield from _parquet_pieces(where, key)
        else:
            yield from _text_pieces(where)


def in_sampling_order(found: FoundSource) -> list[FileStat]:
    """The files in an order that is fixed but has nothing to do with their names'
    order, so that the first few are typical.
    """
    return sorted(
        found.files,
        key=lambda file: hashlib.sha256(
            _relative(file.path, found.root.path).encode()
        ).digest(),
    )


def _find_builtin(source: DataSource) -> FoundSource:
    if source.path != STDLIB:
        raise DataError(
            "unknown_builtin",
            f"{source.path} is not a builtin corpus; the only one is {STDLIB}",
        )
    folder = Path(sysconfig.get_path("stdlib"))
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        files += [_local_stat(Path(parent, name)) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(
            "no_files",
            f"this Python keeps no sources of its standard library in {folder}; give another path",
        )
    return FoundSource(
        source,
        "builtin",
        place(str(folder)),
        tuple(sorted(files, key=lambda file: file.path)),
    )


def _find_prepared(source: DataSource, prefix: Place) -> FoundSource:
    index = stat(prefix.with_suffix(".idx"))
    tokens = stat(prefix.with_suffix(".bin"))
    if index is None and tokens is None:
        raise DataError(
            "not_found",
            f"{source.path} does not exist where the job runs; check the path, or mount it "
            f"there; {_WANTED}",
        )
    if index is None or tokens is None:
        missing = ".idx" if index is None else ".bin"
        raise DataError(
            "incomplete_prefix",
            f"{prefix.path}{missing} is missing beside its neighbour; "
            "prepared data need both files",
        )
    return FoundSource(source, "prepared", prefix, (index, tokens))


def _local_stat(path: Path) -> FileStat:
    info = path.stat()
    return FileStat(str(path), info.st_size, info.st_mtime_ns)


def _glob(root: Place) -> list[FileStat]:
    parts = PurePosixPath(root.path).parts
    first = next(
        number for number, part in enumerate(parts) if any(mark in part for mark in _WILD)
    )
    base = Place(
        root.filesystem, str(PurePosixPath(*parts[:first])) if first else "", root.local
    )
    if not is_folder(base):
        return []
    return [file for file in walk(base) if _matches(PurePosixPath(file.path).parts, parts)]


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Component by component, as a shell does; `**` stands for any number of folders."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or (
            bool(parts) and _matches(parts[1:], patterns)
        )
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], patterns[0])
        and _matches(parts[1:], patterns[1:])
    )


def _checked(source: DataSource, files: list[FileStat]) -> tuple[FileStat, ...]:
    if not files:
        raise DataError(
            "not_found",
            f"no file matches {source.path} where the job runs; check the pattern",
        )
    for file in files:
        if _suffix(file.path) not in _READABLE:
            raise DataError(
                "file_type", f"{file.path} is of a type that cannot be read; {_WANTED}"
            )
    if not sum(file.size for file in files):
        raise DataError("empty", f"{source.path} is empty; give files with text in them")
    return tuple(sorted(files, key=lambda file: file.path))


def _text_pieces(where: Place) -> Iterator[Piece]:
    with (
        open_stream(where) as stream,
        io.TextIOWrapper(stream, "utf-8", newline="") as reader,
    ):
        yield from _cut(reader)


def _cut(reader: io.TextIOWrapper) -> Iterator[Piece]:
    """Pieces end at a line's end, where tokens seldom cross."""
    text = _read_lines(reader)
    while text:
        following = _read_lines(reader)
        yield Piece(text, not following)
        text = following


def _read_lines(reader: io.TextIOWrapper) -> str:
    text = reader.read(_PIECE_CHARS)
    return (
        text + reader.readline(_PIECE_CHARS)
        if len(text) == _PIECE_CHARS and not text.endswith("\n")
        else text
    )


def _builtin_pieces(path: Path) -> Iterator[Piece]:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return  # a few files are in other encodings on purpose
    if text:
        yield Piece(text, True)


def _jsonl_pieces(where: Place, key: str) -> Iterator[Piece]:
    with open_stream(where) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if line.isspace():
                continue
            text = _line_text(line, key, f"{where.path}:{number}")
            if text:
                yield Piece(text, True)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    return iter(stream.readline, b"")


def _line_text(line: bytes, key: str, name: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "bad_line",
            f"{name} is not JSON ({_first_line(error)}); mend or remove the line",
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            "bad_line",
            f"{name} is a JSON {type(record).__name__}, not an object with a field {key!r}",
        )
    if key not in record:
        has = ", ".join(sorted(record)[:8]) or "none"
        raise DataError(
            "text_key",
            f"{name} has no field {key!r} (its fields: {has}); set text_key to the field "
            "with the text",
            "text_key",
        )
    if not isinstance(record[key], str):
        raise DataError(
            "text_key",
            f"{name}: field {key!r} is a {type(record[key]).__name__}, not text; set text_key",
            "text_key",
        )
    return str(record[key])


def _parquet_pieces(where: Place, key: str) -> Iterator[Piece]:
    with where.filesystem.open_input_file(where.path) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DataError(
                "file_type", f"{where.path} is not a Parquet file: {_first_line(error)}"
            ) from error
        check_column(table.schema_arrow, key, where.path)
        for batch in table.iter_batches(batch_size=1024, columns=[key]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield Piece(text, True)


def check_column(schema: pa.Schema, key: str, name: str) -> None:
    """Raises DataError when the Parquet schema has no text column `key`."""
    if key not in schema.names:
        has = ", ".join(schema.names[:8])
        raise DataError(
            "text_key",
            f"{name} has no column {key!r} (its columns: {has}); set text_key to the "
            "column with the text",
            "text_key",
        )
    kind = schema.field(key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(
            "text_key",
            f"{name}: column {key!r} is {kind}, not text; set text_key to a text column",
            "text_key",
        )


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What reading may raise, as DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        text = (
            f"{name} is not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert it to "
            "UTF-8"
        )
        raise DataError("not_utf8", text) from error
    except PermissionError as error:
        raise DataError(
            "unreadable",
            f"{name} may not be read by the user that runs the job; change its permissions",
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            "not_found", f"{name} does not exist where the job runs; check the path"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            "unreadable",
            f"{name} cannot be read: {_first_line(error)}; check the path and the credentials",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root)


def _hidden(path: str, root: str) -> bool:
    return any(
        part.startswith((".", "_"))
        for part in PurePosixPath(_relative(path, root)).parts
        if part != "/"
    )
