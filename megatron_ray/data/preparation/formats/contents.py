"""Recognizes files whose contents are not what their names stand for.

Owns: the first bytes of other formats, and what to do with such files. Pure. Must not
know: how files are opened.

A compressed file without its suffix, or UTF-16 without a mark, would otherwise be text of
wrong characters, or rows of which each is bad.
"""

import codecs
import re

from megatron_ray.data.preparation.formats.records import BadRecord

HEAD_BYTES = 512
"""Bytes of a file's beginning that show what it holds."""
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_TAR_MAGIC_AT = 257
_ENOUGH_BYTES = 64
_UNPACK = "unpack it"
_COMPRESSIONS = {
    "gzip": re.compile(rb"\x1f\x8b"),
    # The second is a frame of other data before the compressed ones.
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
_FORMS = (
    (_COMPRESSIONS["gzip"], "compressed with gzip", "add .gz to its name"),
    (_COMPRESSIONS["zstd"], "compressed with zstd", "add .zst to its name"),
    (_COMPRESSIONS["bz2"], "compressed with bzip2", "add .bz2 to its name"),
    (_COMPRESSIONS["xz"], "compressed with xz", "add .xz to its name"),
    (re.compile(rb"\x04\x22\x4d\x18"), "compressed with lz4", _UNPACK),
    (re.compile(rb"PK\x03\x04"), "a zip archive", _UNPACK),
    (re.compile(rb"PAR1\x15"), "a Parquet file", "let its name end in .parquet"),
    (re.compile(rb"ARROW1\x00\x00"), "an Arrow file", "let its name end in .arrow"),
)
"""First bytes, what they show, and the remedy."""


def other_content(head: bytes, name: str, compression: str | None) -> BadRecord | None:
    """Returns what a file of text or lines holds instead; None when it may be text.

    `head` is its beginning, after unpacking where it has a `compression`.
    """
    if compression is not None:
        name = f"the file in {name}"
    for magic, form, remedy in _FORMS:
        if magic.match(head):
            if compression is not None:
                remedy = _UNPACK
            return BadRecord(f"{name} is {form}", remedy, "file_type")
    if head[_TAR_MAGIC_AT:].startswith(b"ustar"):
        return BadRecord(f"{name} is a tar archive", _UNPACK, "file_type")
    if head.startswith(_UTF16_MARKS):
        return BadRecord(f"{name} is UTF-16 text", "convert it to UTF-8", "not_utf8")
    if not _has_zero_bytes(head):
        return None
    if head.strip(b"\0"):
        return BadRecord(f"{name} is UTF-16 text", "convert it to UTF-8", "not_utf8")
    return BadRecord(f"{name} holds zero bytes in place of text", "restore it", "not_utf8")


def is_compressed(head: bytes, compression: str) -> bool:
    """Whether a file begins as one of a compression does."""
    return _COMPRESSIONS[compression].match(head) is not None


def _has_zero_bytes(head: bytes) -> bool:
    """Whether as many bytes are zero as in text of two or four bytes per character."""
    return len(head) >= _ENOUGH_BYTES and head.count(0) * 4 >= len(head)
