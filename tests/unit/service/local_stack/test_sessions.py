"""Sessions and records: nothing runs unrecorded, no unrelated process is killed, and an
interrupted teardown can be repeated.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.local_stack import record as record_module
from service.local_stack.ray_head import (
    PORT_NAMES,
    available_cpus,
    free_ports,
    head_command,
    is_free,
    may_raise_priority,
    ray_environment,
)
from service.local_stack.record import (
    RecordUnreadableError,
    StackRecord,
    forget,
    read_record,
    record_path,
    write_record,
)
from service.local_stack.sessions import (
    GatedProcess,
    Session,
    is_running,
    kill_sessions,
    members,
    read_process,
    send_signal,
)
from service.local_stack.teardown import down, remove_temp_dir


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def gated(log: Path) -> Iterator[GatedProcess]:
    process = GatedProcess(
        [
            sys.executable,
            "-c",
            "import os; print(os.environ.get('SECRET'), os.environ.get('GONE'), flush=True)",
        ],
        log=log,
    )
    yield process
    kill_sessions([process.session])
    process.abandon()


def make_record(data_dir: Path, **changes: object) -> StackRecord:
    me = read_process(os.getpid())
    assert me is not None
    values = {
        "stack_id": "abc",
        "boot_id": record_module.boot_id(),
        "pid_namespace": record_module.pid_namespace(),
        "up_pid": me.pid,
        "up_start_ticks": me.start_ticks,
        "temp_dir": str(data_dir / "mr-temp"),
        "data_dir": str(data_dir),
        **changes,
    }
    return StackRecord.model_validate(values)


def test_nothing_runs_before_the_gate_opens(gated: GatedProcess, log: Path) -> None:
    time.sleep(0.1)
    assert log.read_text() == ""
    assert [process.pid for process in members([gated.session])] == [gated.process.pid], (
        "it waits in a session of its own"
    )


def test_environment_goes_through_the_gate(
    gated: GatedProcess, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.release({"SECRET": "a b=c'\"$x", "GONE": None})
    assert gated.process.wait(timeout=10) == 0
    assert log.read_text() == "a b=c'\"$x None\n"


def test_a_value_of_several_lines_is_refused(gated: GatedProcess) -> None:
    with pytest.raises(ValueError, match="several lines"):
        gated.release({"SECRET": "a\ngo"})


def test_the_command_never_runs_when_its_parent_dies_at_the_gate(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from service.local_stack.sessions import GatedProcess
gated = GatedProcess(["touch", {str(tmp_path / "ran")!r}], log=Path({str(tmp_path / "log")!r}))
print(gated.session.sid, gated.session.start_ticks, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    sid, ticks = map(int, done.stdout.split())
    deadline = time.monotonic() + 5
    while is_running(sid, ticks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(sid, ticks)
    assert not (tmp_path / "ran").exists()


def test_abandoned_command_never_runs(log: Path, tmp_path: Path) -> None:
    gated = GatedProcess(["touch", str(tmp_path / "ran")], log=log)
    gated.abandon()
    assert gated.process.returncode == 1
    assert not (tmp_path / "ran").exists()


def test_killing_takes_children_in_other_process_groups_too(log: Path) -> None:
    script = (
        "import subprocess, time; subprocess.Popen(['sleep', '100'], process_group=0); "
        "print('up', flush=True); time.sleep(100)"
    )
    gated = GatedProcess([sys.executable, "-c", script], log=log)
    gated.release({})
    deadline = time.monotonic() + 10
    while "up" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kill_sessions([gated.session]) == 2
    gated.process.wait()
    assert members([gated.session]) == []


def test_a_recycled_pid_is_left_alone(log: Path) -> None:
    gated = GatedProcess(["sleep", "100"], log=log)
    older = Session(
        gated.session.sid, gated.session.start_ticks - 1000
    )  # as if the recorded session had ended long before
    assert members([older]) == []
    assert kill_sessions([older]) == 0
    assert not send_signal(older.sid, older.start_ticks, signal.SIGKILL)
    assert gated.process.poll() is None
    gated.abandon()


def test_record_is_private_and_replaced_whole(tmp_path: Path) -> None:
    record = make_record(tmp_path, token="secret")
    write_record(record)
    assert record_path(tmp_path).stat().st_mode & 0o777 == 0o600
    write_record(
        record.with_session("ray", Session(5, 6)).with_session("ray", Session(7, 8))
    )
    again = read_record(tmp_path)
    assert again is not None
    assert [(entry.name, entry.sid) for entry in again.sessions] == [("ray", 7)]
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]
    (tmp_path / "stack.json.rest").write_text("")
    forget(tmp_path)
    assert read_record(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text('{"version": 2}')
    with pytest.raises(RecordUnreadableError, match="another version"):
        read_record(tmp_path)


@pytest.mark.parametrize("changes", [{"boot_id": "another"}, {"pid_namespace": 1}])
def test_nothing_is_killed_after_a_reboot_or_in_another_container(
    tmp_path: Path, log: Path, changes: dict[str, object]
) -> None:
    gated = GatedProcess(["sleep", "100"], log=log)
    record = make_record(tmp_path, **changes).with_session("ray", gated.session)
    write_record(record)
    (tmp_path / "mr-temp").mkdir()
    report = down(tmp_path, lambda text: None, job_grace_s=0)
    assert report.was_up
    assert report.processes_killed == 0
    assert gated.process.poll() is None
    assert not (tmp_path / "mr-temp").exists()
    assert read_record(tmp_path) is None
    gated.abandon()


def test_down_kills_an_up_that_ignores_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.local_stack.teardown._UP_GRACE_S", 0.3)
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); "
        "time.sleep(100)"
    )
    stubborn = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == "ready\n"
    process = read_process(stubborn.pid)
    assert process is not None
    write_record(
        make_record(tmp_path, up_pid=process.pid, up_start_ticks=process.start_ticks)
    )
    assert not down(tmp_path, lambda text: None, job_grace_s=0).ended_by_up
    assert stubborn.wait(timeout=5) == -signal.SIGKILL
    assert read_record(tmp_path) is None
    stubborn.stdout.close()


def test_only_temp_dirs_of_stacks_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a temp dir of a local stack"):
        remove_temp_dir(tmp_path)
    assert tmp_path.exists()


def test_ray_gets_every_port_and_no_secret() -> None:
    ports = free_ports(PORT_NAMES)
    assert len(set(ports.values())) == len(PORT_NAMES)
    assert all(is_free(port) for port in ports.values())
    command = head_command(ports, Path("/tmp/mr-x"), 2)
    assert all(
        any(argument.endswith(f"={port}") for argument in command)
        for port in ports.values()
    )
    environment = ray_environment("token", Path("/tmp/mr-x"))
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "token" not in command
    assert environment["RAY_worker_niceness"] == ("15" if may_raise_priority() else "0"), (
        "ranks that cannot raise themselves start high"
    )


def test_cpus_follow_the_container(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("max 100000")
    assert available_cpus(quota) == max(2, len(os.sched_getaffinity(0)))
    quota.write_text("50000 100000")
    assert available_cpus(quota) == 2, "a two-rank job fits on any machine"
    assert available_cpus(tmp_path / "none") >= 2
