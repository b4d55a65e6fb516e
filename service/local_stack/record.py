"""stack.json.

Owns: what is recorded of a local stack, before each thing starts, so that `down` can
always end it.

Must not know: how anything is started or ended.
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


class RecordUnreadableError(Exception):
    """stack.json is there but cannot be understood; the message says what to do."""


class RecordedSession(BaseModel):
    """One session that was or is about to be started."""

    model_config = ConfigDict(frozen=True)

    name: Literal["ray", "service", "agent"]
    sid: int
    start_ticks: int

    @property
    def session(self) -> Session:
        """The session's identity."""
        return Session(self.sid, self.start_ticks)


class StackRecord(BaseModel):
    """One local stack. Frozen: a change is a new record, written at once."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    stack_id: str
    boot_id: str
    """Start times count from this boot; after another one nothing of the stack can be
    alive."""
    pid_namespace: int
    """Pids mean something only in here."""
    phase: Literal["starting", "ready"] = "starting"
    up_pid: int
    """The process that supervises."""
    up_start_ticks: int
    temp_dir: str
    """Removed at the end; holds nothing worth keeping."""
    data_dir: str
    url: str = ""
    """Address of the REST service."""
    token: str = ""
    """Token of the local user for the REST service."""
    ray_address: str = ""
    """host:port of Ray's GCS."""
    dashboard_url: str = ""
    ray_token: str = ""
    """What the Ray dashboard asks for."""
    ports: dict[str, int] = Field(default_factory=dict)
    sessions: tuple[RecordedSession, ...] = ()

    def with_session(
        self, name: Literal["ray", "service", "agent"], session: Session
    ) -> "StackRecord":
        """This record with `name` now being that session."""
        others = tuple(entry for entry in self.sessions if entry.name != name)
        return self.model_copy(
            update={
                "sessions": (
                    *others,
                    RecordedSession(
                        name=name, sid=session.sid, start_ticks=session.start_ticks
                    ),
                )
            }
        )

    @property
    def may_be_alive(self) -> bool:
        """Whether this boot and this pid namespace are the ones that the stack was
        started in.
        """
        return self.boot_id == boot_id() and self.pid_namespace == pid_namespace()


def record_path(data_dir: Path) -> Path:
    """Where the record of a data dir's stack lies."""
    return data_dir / RECORD_NAME


def write_record(record: StackRecord) -> None:
    """Replaces stack.json atomically and durably; readable by its owner only, because
    it holds tokens.
    """
    folder = Path(record.data_dir)
    handle, name = tempfile.mkstemp(
        dir=folder, prefix=RECORD_NAME + "."
    )  # mode 0600 by definition
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
    """The recorded stack; None when none is. Raises RecordUnreadableError."""
    path = record_path(data_dir)
    try:
        return StackRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise RecordUnreadableError(
            f"{path} belongs to somebody else; name your own with --data-dir"
        ) from error
    except ValidationError as error:
        raise RecordUnreadableError(
            f"{path} was written by another version; end that stack with the version that "
            "started it"
        ) from error


def forget(data_dir: Path) -> None:
    """Takes the record away, and what an interrupted write left of it."""
    record_path(data_dir).unlink(missing_ok=True)
    for rest in data_dir.glob(RECORD_NAME + ".*"):
        rest.unlink(missing_ok=True)


def boot_id() -> str:
    """Random id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> int:
    """Identity of the pid namespace that this process lives in."""
    return os.stat("/proc/self/ns/pid").st_ino
