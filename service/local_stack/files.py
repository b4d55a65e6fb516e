"""Reads and writes the files of a local stack: lock, tokens, logs, last port.

Owns: the modes of its folders, and the size of logs. Must not know: processes.
"""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from service.http.tokens import Scope, read_or_create_tokens
from service.local_stack.interruption import StackError
from service.local_stack.ray_head import is_free
from service.local_stack.record import LOCK_NAME, PROCESS_NAMES, ProcessName, read_record
from service.settings import SettingsError

_LOG_TAIL_LINES = 20
_LAST_PORT = "service.port"
MAX_LOG_BYTES = 32 << 20
"""Size at which a log is rotated; with the previous one a process fills twice as much."""


def private_folder(path: Path) -> Path:
    """Returns a folder that only its owner can enter, which is made if need be.

    Raises OSError.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    # One that an earlier version has made, or that belongs to another user.
    with contextlib.suppress(PermissionError):
        path.chmod(0o700)
    return path


class StackFiles:
    """The files in a local stack's data dir."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    def lock(self) -> IO[str]:
        """Returns the open lock file; the lock is held until it is closed.

        Raises StackError when another `up` holds it or the folder is not writable.
        """
        try:
            private_folder(self.data_dir)
            lock = (self.data_dir / LOCK_NAME).open("w")
        except OSError as error:
            raise StackError(
                f"cannot write to the data dir {self.data_dir}: {error.strerror}; "
                "choose another with --data-dir"
            ) from error
        # The kernel drops the lock with the process, so one that was killed leaves none.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise StackError(self._already_up()) from error
        return lock

    def _already_up(self) -> str:
        # The other `up` may hold the lock before its record has an address.
        status = "starting"
        record = read_record(self.data_dir)
        if record is not None and record.url:
            status = f"up at {record.url} (pid {record.up_pid})"
        return (
            f"a stack with data dir {self.data_dir} is already {status}; stop it with "
            f"`megatron-ray down --data-dir {self.data_dir}`, or choose another data dir "
            "with --data-dir"
        )

    @property
    def tokens_file(self) -> Path:
        """The path of the service's tokens."""
        return self.data_dir / "tokens.json"

    def tokens(self) -> dict[Scope, str]:
        """Returns the service's tokens, which the first call creates.

        Raises StackError when the file cannot be read or written.
        """
        try:
            return read_or_create_tokens(self.tokens_file)
        except SettingsError as error:
            raise StackError(str(error)) from error

    def last_port(self) -> int:
        """Returns the port that the service had before, or 0 when it is not free.

        The same port keeps addresses valid after a restart; with 0 the kernel chooses.
        """
        try:
            port = int((self.data_dir / _LAST_PORT).read_text())
        except (OSError, ValueError):
            return 0
        if not is_free(port):
            return 0
        return port

    def save_port(self, port: int) -> None:
        """Stores the service's port for `last_port`."""
        (self.data_dir / _LAST_PORT).write_text(f"{port}\n")

    def log(self, name: ProcessName) -> Path:
        """Returns the path of a process's log."""
        return self.data_dir / "logs" / f"{name}.log"

    def rotate_logs(self) -> None:
        """Renames the logs of the previous stack, replacing those before it."""
        private_folder(self.data_dir / "logs")
        for name in PROCESS_NAMES:
            log = self.log(name)
            if log.exists():
                log.replace(_previous(log))

    def limit_logs(self) -> None:
        """Rotates the logs that have become large, while their processes write to them."""
        for name in PROCESS_NAMES:
            log = self.log(name)
            # A full disk must not end the stack.
            with contextlib.suppress(OSError):
                if log.stat().st_size > MAX_LOG_BYTES:
                    # Copied, because the process keeps its file open, to append to.
                    shutil.copyfile(log, _previous(log))
                    os.truncate(log, 0)

    def log_tail(self, name: ProcessName) -> str:
        """Returns the path of a process's log and its last lines."""
        log = self.log(name)
        try:
            lines = log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return "\n".join([f"--- {log}", *lines[-_LOG_TAIL_LINES:]])


def _previous(log: Path) -> Path:
    return log.with_suffix(".previous.log")
