"""Serves a folder as a file system whose operations fail on command; a process.

`python -m tests.support.faulty_storage.server FOLDER MOUNT_POINT`, as root. Prints `ready`
when it is mounted, and after each line of standard input, which is a fault, once that is on.
The end of the input unmounts.

Owns: the mount, the threads that answer the kernel. Must not know: what the faults are
for.
"""

import ctypes
import errno
import os
import resource
import sys
import threading

from tests.support.faulty_storage.faults import Fault, FaultSwitch
from tests.support.faulty_storage.passthrough import Passthrough
from tests.support.faulty_storage.protocol import (
    BUFFER_BYTES,
    WITHOUT_REPLY,
    Request,
    reply,
)

DEVICE = "/dev/fuse"
NUM_THREADS = 24
"""As many operations may wait at once; further ones wait in the kernel."""
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def mount(device: int, mount_point: str) -> None:
    """Mounts what is served at a device. Raises OSError."""
    options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    kind = b"fuse.faulty"
    result = _libc.mount(b"faulty", os.fsencode(mount_point), kind, 0, options.encode())
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), mount_point)


def unmount(mount_point: str) -> None:
    """Unmounts, also when files are open there or the server has died."""
    _libc.umount2(os.fsencode(mount_point), _MNT_DETACH)


class Server:
    """Answers the kernel's requests."""

    def __init__(self, device: int, files: Passthrough, switch: FaultSwitch) -> None:
        self._device = device
        self._files = files
        self._switch = switch

    def start(self) -> None:
        """Starts the threads; they end with the process."""
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                data = os.read(self._device, BUFFER_BYTES)
            except OSError as error:
                # An interrupted request; after an unmount there are no more.
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return
            self._answer(Request.parse(data))

    def _answer(self, request: Request) -> None:
        body = b""
        error_number = 0
        try:
            self._switch.pass_through(request.operation)
            body = self._files.carry_out(request)
        except OSError as error:
            error_number = error.errno or errno.EIO
        if request.operation in WITHOUT_REPLY:
            return
        try:
            os.write(self._device, reply(request.unique, body, error_number))
        except OSError as error:
            # Its caller has been killed meanwhile.
            if error.errno != errno.ENOENT:
                raise


def main(folder: str, mount_point: str) -> None:
    """Serves until standard input ends."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0)
    switch = FaultSwitch()
    device = os.open(DEVICE, os.O_RDWR)
    mount(device, mount_point)
    try:
        Server(device, Passthrough(folder), switch).start()
        _print_ready()
        for line in sys.stdin:
            switch.turn_on(Fault.from_line(line))
            _print_ready()
    finally:
        unmount(mount_point)


def _print_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
