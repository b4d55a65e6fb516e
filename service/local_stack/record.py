"""Reads and writes stack.json, the record of a local stack.

Every process is recorded before it runs, so that `down` can always stop the stack. Must
not know: how anything is started or stopped.
"""

import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.local_stack.sessions import Session

RECORD_NAME = "stack.json"
LOCK_NAME = "stack.lock"
TEMP_PREFIX = "mr-"

ProcessName = Literal["ray", "service", "agent"]
PROCESS_NAMES: tuple[ProcessName, ...] = ("ray", "service", "agent")


class RecordUnreadableError(Exception):
    """stack.json exists but cannot be read; the message names the remedy."""


class RecordedSession(BaseModel):
    """The session of one process that runs or is about to run."""

    model_config = ConfigDict(frozen=True)

    name: ProcessName
    sid: int
    start_ticks: int

    @property
    def session(self) -> Session:
        """The session's identity."""
        return Session(self.sid, self.start_ticks)


class StackRecord(BaseModel):
    """The record of one local stack.

    Frozen: every change is a new record, which is written at once.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    stack_id: str
    boot_id: str
    """Boot that start times count from; after a reboot no process of the stack lives."""
    pid_namespace: int
    """Namespace in which the pids are valid."""
    phase: Literal["starting", "ready"] = "starting"
    up_pid: int
    """Pid of the `up` process, which supervises the others."""
    up_start_ticks: int
    temp_dir: str
    """Folder for sockets and Ray's session files; removed at the end."""
    data_dir: str
    url: str = ""
    """Address of the REST service."""
    token: str = ""
    """Token of the local user for the REST service."""
    ray_address: str = ""
    """host:port of Ray's GCS."""
    dashboard_url: str = ""
    ray_token: str = ""
    """Token for the Ray cluster and its dashboard."""
    ports: dict[str, int] = Field(default_factory=dict)
    sessions: tuple[RecordedSession, ...] = ()

    def with_session(self, name: ProcessName, session: Session) -> "StackRecord":
        """Returns a copy in which the process `name` has this session."""
        entry = RecordedSession(name=name, sid=session.sid, start_ticks=session.start_ticks)
        others = tuple(other for other in self.sessions if other.name != name)
        return self.model_copy(update={"sessions": (*others, entry)})

    @property
    def may_be_alive(self) -> bool:
        """Whether the stack was started in this boot and this pid namespace."""
        return self.boot_id == boot_id() and self.pid_namespace == pid_namespace()


def record_path(data_dir: Path) -> Path:
    """Returns the path of a data dir's stack.json."""
    return data_dir / RECORD_NAME


def write_record(record: StackRecord) -> None:
    """Replaces stack.json atomically and durably."""
    folder = Path(record.data_dir)
    # The record holds tokens; mkstemp makes files that only their owner can read.
    handle, name = tempfile.mkstemp(dir=folder, prefix=RECORD_NAME + ".")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(record.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, record_path(folder))
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def read_record(data_dir: Path) -> StackRecord | None:
    """Returns the recorded stack, or None without a record.

    Raises RecordUnreadableError when the record belongs to another user or version.
    """
    path = record_path(data_dir)
    try:
        return StackRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise RecordUnreadableError(
            f"{path} belongs to another user; choose another folder with --data-dir"
        ) from error
    except ValidationError as error:
        raise RecordUnreadableError(
            f"{path} was written by another version; stop that stack with the version "
            "that started it"
        ) from error


def forget(data_dir: Path) -> None:
    """Removes the record and the leftovers of interrupted writes."""
    record_path(data_dir).unlink(missing_ok=True)
    for leftover in data_dir.glob(RECORD_NAME + ".*"):
        leftover.unlink(missing_ok=True)


def boot_id() -> str:
    """Returns the random id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> int:
    """Returns the identity of this process's pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino
