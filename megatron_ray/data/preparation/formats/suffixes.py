"""Recognizes the formats of data files by their names.

Owns: the suffixes that are read, and the remedies for those that are not. Pure. Must not
know: the contents of files.
"""

from pathlib import PurePosixPath
from typing import Literal, NamedTuple

TYPES = ".txt, .jsonl, .parquet, .arrow"
"""The main suffixes that are read, for messages."""

Kind = Literal["text", "json_lines", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json_lines",
    ".jsonlines": "json_lines",
    ".ndjson": "json_lines",
    ".json": "json_lines",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
}
"""Suffix -> name of the compression, as `storage.files.open_stream` takes it."""

_UNPACK = "unpack it"
_CONVERT = "convert it to .jsonl or .parquet"
_REMEDIES = (
    (
        _UNPACK,
        ".zip .tar .tgz .tbz .tbz2 .txz .tzst .7z .rar .z .lzma .lz .lz4 .br .sz .snappy",
    ),
    (_CONVERT, ".csv .tsv .orc .avro .xls .xlsx .tfrecord .tfrecords"),
    (_CONVERT, ".mds .lance .msgpack .pkl .pickle .npy .npz .h5 .hdf5 .db .sqlite .warc"),
    ("give the pair as a source of its own, by its name without suffix", ".bin .idx"),
)
"""Remedies and the suffixes of data in formats that are not read."""


class FileFormat(NamedTuple):
    """How a file is read."""

    kind: Kind
    compression: str | None
    """Name of the compression around the whole file."""

    @property
    def is_table(self) -> bool:
        """Whether the file has columns, in batches that it may compress itself."""
        return self.kind in ("parquet", "arrow")

    @property
    def has_fields(self) -> bool:
        """Whether the text is one field or column of several."""
        return self.kind != "text"


def file_format(path: str) -> FileFormat | None:
    """Returns the format that a file's name stands for; None when it is not read."""
    name = PurePosixPath(path.lower())
    compression = _COMPRESSIONS.get(name.suffix)
    if compression is not None:
        name = name.with_suffix("")
    kind = _KINDS.get(name.suffix)
    if kind is None:
        return None
    form = FileFormat(kind, compression)
    # Tables compress their own batches and are not read as a stream.
    if form.is_table and compression is not None:
        return None
    return form


def unpacked_path(path: str) -> str:
    """Returns the path that a compressed file has after unpacking."""
    if PurePosixPath(path.lower()).suffix in _COMPRESSIONS:
        return str(PurePosixPath(path).with_suffix(""))
    return path


def remedy_of(path: str) -> str | None:
    """Returns how a file that is not read could be used.

    None when its name does not look like that of data.
    """
    suffix = PurePosixPath(path.lower()).suffix
    if suffix in _COMPRESSIONS:
        packed = PurePosixPath(unpacked_path(path.lower())).suffix
        if packed in _KINDS or packed in _COMPRESSIONS:
            return _UNPACK
        inner = remedy_of(unpacked_path(path))
        if inner is not None:
            return inner
        return f"{_UNPACK}, or name it by what it holds, such as .jsonl{suffix}"
    for remedy, suffixes in _REMEDIES:
        if suffix in suffixes.split():
            return remedy
    return None
