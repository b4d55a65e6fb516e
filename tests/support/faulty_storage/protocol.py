"""The kernel's FUSE protocol: requests and replies as bytes.

Owns: numbers of operations, layouts of their structures. Must not know: files, faults.
"""

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

MAJOR = 7
MINOR = 31
MAX_WRITE = 1 << 20
BUFFER_BYTES = MAX_WRITE + 4096
_PAGE = 4096
_VALID_S = 1
"""Seconds for which the kernel may use names and attributes without asking again."""

_BIG_WRITES = 1 << 5
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_WANTED_FLAGS = _BIG_WRITES | _PARALLEL_DIROPS | _MAX_PAGES

_REQUEST = struct.Struct("<IIQQIIIHH")
_REPLY = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTRIBUTES_OUT = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QII")
_WRITE_OUT = struct.Struct("<II")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
_DIRENT = struct.Struct("<QQII")

SETATTR = struct.Struct("<IIQQQQQQIIIIIIII")
MKDIR = struct.Struct("<II")
RENAME = struct.Struct("<Q")
RENAME2 = struct.Struct("<QII")
LINK = struct.Struct("<Q")
OPEN = struct.Struct("<II")
CREATE = struct.Struct("<IIII")
READ = struct.Struct("<QQIIQII")
WRITE = struct.Struct("<QQIIQII")
HANDLE = struct.Struct("<Q")
"""First field of the requests about an open file: fsync, release, flush."""
FORGET = struct.Struct("<Q")
BATCH_FORGET = struct.Struct("<II")
FORGET_ONE = struct.Struct("<QQ")


class Operation(IntEnum):
    """Operations that this server carries out; it refuses all others with ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    RENAME2 = 45


WITHOUT_REPLY = (Operation.FORGET, Operation.BATCH_FORGET, Operation.INTERRUPT)


@dataclass(frozen=True)
class Request:
    """One request of the kernel."""

    operation: int
    unique: int
    node: int
    body: bytes

    @classmethod
    def parse(cls, data: bytes) -> "Request":
        """Reads the header that every request begins with."""
        _, operation, unique, node, _, _, _, _, _ = _REQUEST.unpack_from(data)
        return cls(operation, unique, node, data[_REQUEST.size :])

    def names(self, offset: int = 0) -> list[str]:
        """Returns the strings that follow the first `offset` bytes of the body."""
        parts = self.body[offset:].split(b"\0")
        return [os.fsdecode(part) for part in parts[:-1]]


def reply(unique: int, body: bytes = b"", error: int = 0) -> bytes:
    """Returns a reply; `error` is an errno, 0 for success."""
    return _REPLY.pack(_REPLY.size + len(body), -error, unique) + body


def init_reply(request: Request) -> bytes:
    """Returns the body that answers the kernel's first request."""
    _, _, max_readahead, flags = _INIT_IN.unpack_from(request.body)
    return _INIT_OUT.pack(
        MAJOR,
        MINOR,
        max_readahead,
        flags & _WANTED_FLAGS,
        64,
        48,
        MAX_WRITE,
        1,
        MAX_WRITE // _PAGE,
        0,
        0,
    )


def attributes(status: os.stat_result) -> bytes:
    """Returns a file's attributes."""
    seconds = []
    nanoseconds = []
    for time_ns in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns):
        seconds.append(time_ns // 10**9)
        nanoseconds.append(time_ns % 10**9)
    return _ATTRIBUTES.pack(
        status.st_ino,
        status.st_size,
        status.st_blocks,
        *seconds,
        *nanoseconds,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        0,
        _PAGE,
        0,
    )


def attributes_reply(status: os.stat_result) -> bytes:
    """Returns the body that answers a question for attributes."""
    return _ATTRIBUTES_OUT.pack(_VALID_S, 0, 0) + attributes(status)


def entry_reply(node: int, status: os.stat_result) -> bytes:
    """Returns the body that names the node of a file."""
    return _ENTRY.pack(node, 0, _VALID_S, _VALID_S, 0, 0) + attributes(status)


def open_reply(handle: int) -> bytes:
    """Returns the body that answers an open."""
    return _OPEN_OUT.pack(handle, 0, 0)


def write_reply(num_bytes: int) -> bytes:
    """Returns the body that answers a write."""
    return _WRITE_OUT.pack(num_bytes, 0)


def statfs_reply(status: os.statvfs_result) -> bytes:
    """Returns the body that describes the file system."""
    return _STATFS_OUT.pack(
        status.f_blocks,
        status.f_bfree,
        status.f_bavail,
        status.f_files,
        status.f_ffree,
        status.f_bsize,
        status.f_namemax,
        status.f_frsize,
        0,
    )


def folder_reply(names: Iterable[tuple[str, int]], offset: int, size: int) -> bytes:
    """Returns entries (name, type) of a folder from number `offset` on, in `size` bytes."""
    content = b""
    for number, (name, kind) in enumerate(names, start=1):
        encoded = os.fsencode(name)
        row = _DIRENT.pack(number, number, len(encoded), kind) + encoded
        row += b"\0" * (-len(row) % 8)
        if number > offset:
            if len(content) + len(row) > size:
                break
            content += row
    return content
