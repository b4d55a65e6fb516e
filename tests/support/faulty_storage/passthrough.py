"""Carries out the operations of a file system on a folder of this machine.

Owns: nodes, open files. Must not know: faults, how requests arrive.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.faulty_storage import protocol
from tests.support.faulty_storage.protocol import Operation, Request

ROOT = 1
_SET_MODE = 1 << 0
_SET_SIZE = 1 << 3
_SET_ATIME = 1 << 4
_SET_MTIME = 1 << 5
_SET_ATIME_NOW = 1 << 7
_SET_MTIME_NOW = 1 << 8


@dataclass
class Node:
    """A file that the kernel knows, by a descriptor that survives renames."""

    descriptor: int
    key: tuple[int, int]
    lookups: int = 0

    @property
    def path(self) -> str:
        """A path that always leads to it."""
        return f"/proc/self/fd/{self.descriptor}"


@dataclass
class Passthrough:
    """The files below a folder."""

    folder: str
    _nodes: dict[int, Node] = field(default_factory=dict)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    _listings: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last: int = ROOT

    def __post_init__(self) -> None:
        root = os.open(self.folder, os.O_PATH)
        status = os.fstat(root)
        self._nodes[ROOT] = Node(root, (status.st_dev, status.st_ino), 1)
        self._handlers: dict[int, Callable[[Request], bytes]] = {
            Operation.LOOKUP: self._look_up,
            Operation.FORGET: self._forget,
            Operation.BATCH_FORGET: self._forget_batch,
            Operation.INTERRUPT: self._nothing,
            Operation.GETATTR: self._attributes,
            Operation.SETATTR: self._set_attributes,
            Operation.READLINK: self._read_link,
            Operation.SYMLINK: self._symlink,
            Operation.MKDIR: self._make_folder,
            Operation.UNLINK: self._unlink,
            Operation.RMDIR: self._remove_folder,
            Operation.RENAME: self._rename,
            Operation.RENAME2: self._rename2,
            Operation.LINK: self._link,
            Operation.OPEN: self._open,
            Operation.CREATE: self._create,
            Operation.READ: self._read,
            Operation.WRITE: self._write,
            Operation.STATFS: self._statfs,
            Operation.RELEASE: self._release,
            Operation.FSYNC: self._fsync,
            Operation.FLUSH: self._nothing,
            Operation.INIT: protocol.init_reply,
            Operation.OPENDIR: self._open_folder,
            Operation.READDIR: self._read_folder,
            Operation.RELEASEDIR: self._release_folder,
            Operation.FSYNCDIR: self._nothing,
            Operation.DESTROY: self._nothing,
        }

    def carry_out(self, request: Request) -> bytes:
        """Returns the body of the reply. Raises OSError."""
        handler = self._handlers.get(request.operation)
        if handler is None:
            raise OSError(errno.ENOSYS, "not offered")
        return handler(request)

    # ---- nodes

    def _node(self, request: Request) -> Node:
        with self._lock:
            return self._nodes[request.node]

    def _entry(self, parent: Node, name: str) -> bytes:
        """Returns the reply that names the node of a file."""
        flags = os.O_PATH | os.O_NOFOLLOW
        descriptor = os.open(name, flags, dir_fd=parent.descriptor)
        status = os.fstat(descriptor)
        key = (status.st_dev, status.st_ino)
        with self._lock:
            number = self._numbers.get(key)
            if number is None:
                self._last += 1
                number = self._last
                self._numbers[key] = number
                self._nodes[number] = Node(descriptor, key)
            else:
                os.close(descriptor)
            self._nodes[number].lookups += 1
        return protocol.entry_reply(number, status)

    def _drop(self, number: int, lookups: int) -> None:
        with self._lock:
            node = self._nodes.get(number)
            if node is None or number == ROOT:
                return
            node.lookups -= lookups
            if node.lookups <= 0:
                del self._nodes[number]
                del self._numbers[node.key]
                os.close(node.descriptor)

    def _look_up(self, request: Request) -> bytes:
        return self._entry(self._node(request), request.names()[0])

    def _forget(self, request: Request) -> bytes:
        (lookups,) = protocol.FORGET.unpack_from(request.body)
        self._drop(request.node, lookups)
        return b""

    def _forget_batch(self, request: Request) -> bytes:
        count, _ = protocol.BATCH_FORGET.unpack_from(request.body)
        for index in range(count):
            offset = protocol.BATCH_FORGET.size + index * protocol.FORGET_ONE.size
            self._drop(*protocol.FORGET_ONE.unpack_from(request.body, offset))
        return b""

    def _nothing(self, request: Request) -> bytes:
        return b""

    # ---- attributes

    def _attributes(self, request: Request) -> bytes:
        return protocol.attributes_reply(os.fstat(self._node(request).descriptor))

    def _set_attributes(self, request: Request) -> bytes:
        node = self._node(request)
        valid, _, _, size, _, *times, mode, _, _, _, _ = protocol.SETATTR.unpack_from(
            request.body
        )
        if valid & _SET_MODE:
            os.chmod(node.path, stat.S_IMODE(mode))
        if valid & _SET_SIZE:
            os.truncate(node.path, size)
        if valid & (_SET_ATIME | _SET_MTIME | _SET_ATIME_NOW | _SET_MTIME_NOW):
            self._set_times(node, valid, times)
        return protocol.attributes_reply(os.fstat(node.descriptor))

    def _set_times(self, node: Node, valid: int, times: list[int]) -> None:
        atime, mtime, _, atime_ns, mtime_ns, _ = times
        if valid & (_SET_ATIME_NOW | _SET_MTIME_NOW):
            os.utime(node.path)
            return
        status = os.fstat(node.descriptor)
        new_atime_ns = status.st_atime_ns
        new_mtime_ns = status.st_mtime_ns
        if valid & _SET_ATIME:
            new_atime_ns = atime * 10**9 + atime_ns
        if valid & _SET_MTIME:
            new_mtime_ns = mtime * 10**9 + mtime_ns
        os.utime(node.path, ns=(new_atime_ns, new_mtime_ns))

    def _statfs(self, request: Request) -> bytes:
        return protocol.statfs_reply(os.statvfs(self.folder))

    # ---- names

    def _read_link(self, request: Request) -> bytes:
        target = os.readlink("", dir_fd=self._node(request).descriptor)
        return os.fsencode(target)

    def _symlink(self, request: Request) -> bytes:
        parent = self._node(request)
        name, target = request.names()
        os.symlink(target, name, dir_fd=parent.descriptor)
        return self._entry(parent, name)

    def _make_folder(self, request: Request) -> bytes:
        parent = self._node(request)
        mode, _ = protocol.MKDIR.unpack_from(request.body)
        (name,) = request.names(protocol.MKDIR.size)
        os.mkdir(name, mode, dir_fd=parent.descriptor)
        return self._entry(parent, name)

    def _unlink(self, request: Request) -> bytes:
        os.unlink(request.names()[0], dir_fd=self._node(request).descriptor)
        return b""

    def _remove_folder(self, request: Request) -> bytes:
        os.rmdir(request.names()[0], dir_fd=self._node(request).descriptor)
        return b""

    def _rename(self, request: Request) -> bytes:
        (target,) = protocol.RENAME.unpack_from(request.body)
        return self._move(request, target, protocol.RENAME.size)

    def _rename2(self, request: Request) -> bytes:
        target, flags, _ = protocol.RENAME2.unpack_from(request.body)
        if flags:
            raise OSError(errno.EINVAL, "flags of a rename are not offered")
        return self._move(request, target, protocol.RENAME2.size)

    def _move(self, request: Request, target: int, offset: int) -> bytes:
        old, new = request.names(offset)
        with self._lock:
            new_parent = self._nodes[target].descriptor
        old_parent = self._node(request).descriptor
        os.rename(old, new, src_dir_fd=old_parent, dst_dir_fd=new_parent)
        return b""

    def _link(self, request: Request) -> bytes:
        (target,) = protocol.LINK.unpack_from(request.body)
        parent = self._node(request)
        (name,) = request.names(protocol.LINK.size)
        with self._lock:
            path = self._nodes[target].path
        os.link(path, name, dst_dir_fd=parent.descriptor, follow_symlinks=True)
        return self._entry(parent, name)

    # ---- open files

    def _open(self, request: Request) -> bytes:
        flags, _ = protocol.OPEN.unpack_from(request.body)
        flags &= ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND)
        return protocol.open_reply(os.open(self._node(request).path, flags))

    def _create(self, request: Request) -> bytes:
        parent = self._node(request)
        flags, mode, _, _ = protocol.CREATE.unpack_from(request.body)
        (name,) = request.names(protocol.CREATE.size)
        # The kernel gives the offset of every write, also of those that append.
        flags = (flags | os.O_CREAT) & ~os.O_APPEND
        handle = os.open(name, flags, mode, dir_fd=parent.descriptor)
        return self._entry(parent, name) + protocol.open_reply(handle)

    def _read(self, request: Request) -> bytes:
        handle, offset, size, *_ = protocol.READ.unpack_from(request.body)
        return os.pread(handle, size, offset)

    def _write(self, request: Request) -> bytes:
        handle, offset, size, *_ = protocol.WRITE.unpack_from(request.body)
        start = protocol.WRITE.size
        content = memoryview(request.body)[start : start + size]
        return protocol.write_reply(os.pwrite(handle, content, offset))

    def _release(self, request: Request) -> bytes:
        (handle,) = protocol.HANDLE.unpack_from(request.body)
        os.close(handle)
        return b""

    def _fsync(self, request: Request) -> bytes:
        (handle,) = protocol.HANDLE.unpack_from(request.body)
        os.fsync(handle)
        return b""

    def _open_folder(self, request: Request) -> bytes:
        names = [(".", stat.S_IFDIR >> 12), ("..", stat.S_IFDIR >> 12)]
        with os.scandir(self._node(request).path) as entries:
            for entry in entries:
                names.append((entry.name, _kind(entry)))
        with self._lock:
            self._last += 1
            self._listings[self._last] = names
            return protocol.open_reply(self._last)

    def _read_folder(self, request: Request) -> bytes:
        handle, offset, size, *_ = protocol.READ.unpack_from(request.body)
        return protocol.folder_reply(self._listings[handle], offset, size)

    def _release_folder(self, request: Request) -> bytes:
        (handle,) = protocol.HANDLE.unpack_from(request.body)
        with self._lock:
            del self._listings[handle]
        return b""


def _kind(entry: os.DirEntry[str]) -> int:
    """Returns the type of an entry as folders store it."""
    if entry.is_symlink():
        return stat.S_IFLNK >> 12
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR >> 12
    return stat.S_IFREG >> 12
