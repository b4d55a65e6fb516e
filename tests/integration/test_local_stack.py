"""A real Ray head, started and ended in every way there is; service and agent are
stand-ins, so only the stack is on trial.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.local_stack.backoff import PROVEN_S
from service.local_stack.interruption import Interruption, StackError
from service.local_stack.record import read_record
from service.local_stack.sessions import members
from service.local_stack.stack import LocalStack
from service.local_stack.teardown import TeardownReport, down
from tests.support.fake_stack import stand_in_options
from tests.support.watched_stack import Watched

pytestmark = pytest.mark.ray


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    stack = Watched(tmp_path / "data")
    yield stack
    stack.process.kill()
    stack.process.wait()
    down(stack.data_dir, lambda text: None, job_grace_s=0)


def end_quietly(data_dir: Path) -> TeardownReport:
    return down(data_dir, lambda text: None, job_grace_s=0)


def test_up_is_whole_heals_and_ends_without_trace(tmp_path: Path) -> None:
    messages: list[str] = []
    stack = LocalStack(
        stand_in_options(tmp_path / "data"),
        report=messages.append,
        interruption=Interruption(),
    )
    try:
        record = stack.start()
        sessions = {entry.name: entry.session for entry in record.sessions}
        assert set(sessions) == {"ray", "service", "agent"}
        assert len(set(record.ports.values())) == 10
        assert (tmp_path / "data" / "stack.json").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "data" / "tokens.json").stat().st_mode & 0o777 == 0o600
        assert len(members([sessions["ray"]])) > 5
        assert (
            httpx.get(f"{record.dashboard_url}/api/version", trust_env=False).status_code
            == 401
        ), "Ray must ask for its token"
        headers = {"Authorization": f"Bearer {record.ray_token}"}
        assert (
            httpx.get(
                f"{record.dashboard_url}/api/version", headers=headers, trust_env=False
            ).status_code
            == 200
        )
        arguments = b"".join(
            Path(f"/proc/{process.pid}/cmdline").read_bytes()
            for process in members(sessions.values())
        )
        assert record.ray_token.encode() not in arguments
        assert record.token.encode() not in arguments

        with pytest.raises(
            StackError, match=r"already up at http://127\.0\.0\.1:.*megatron-ray down"
        ):
            LocalStack(
                stand_in_options(tmp_path / "data"),
                report=messages.append,
                interruption=Interruption(),
            ).start()

        for _ in range(4):
            kill_the_service(stack, record.url, tmp_path / "data")
        assert messages == ["the service exited (signal 9); restarting"] * 4, (
            "one that worked is started again without a wait"
        )

        gcs = next(
            process
            for process in members([sessions["ray"]])
            if b"gcs_server" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        )
        os.kill(gcs.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        stack.supervise(
            until=lambda: time.monotonic() > deadline or "agent restarted" in messages
        )
        again = read_record(tmp_path / "data")
        assert again is not None
        assert again.ray_address != record.ray_address
        assert _answers(f"{again.dashboard_url}/api/gcs_healthz"), (
            "a Ray that dies is replaced whole"
        )
        assert members([sessions["ray"], sessions["agent"]]) == []
        record = again
    finally:
        report = stack.end()
    assert report.was_up
    assert report.processes_killed > 5
    assert members(entry.session for entry in record.sessions) == []
    assert not Path(record.temp_dir).exists()
    assert read_record(tmp_path / "data") is None
    assert end_quietly(tmp_path / "data") == TeardownReport(was_up=False), (
        "ending again is harmless"
    )


def kill_the_service(stack: LocalStack, url: str, data_dir: Path) -> None:
    """Once it has lived for long enough to have proven that it works; returns when the
    next one serves at the same address.
    """
    proven = time.monotonic() + PROVEN_S
    stack.supervise(until=lambda: time.monotonic() > proven)
    record = read_record(data_dir)
    assert record is not None
    (killed,) = [entry.session for entry in record.sessions if entry.name == "service"]
    os.kill(killed.sid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    stack.supervise(
        until=lambda: (
            time.monotonic() > deadline or (members([killed]) == [] and _answers(url))
        )
    )
    assert _answers(url), "the service comes back at the same address"
    assert members([killed]) == [], "what the old service had started is gone"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("moment_s", [0.6, 2.0])
def test_sigkill_of_up_then_down_leaves_nothing(watched: Watched, moment_s: float) -> None:
    watched.watch_for(moment_s)
    watched.signal(signal.SIGKILL)
    watched.process.wait()
    watched.look()
    end_quietly(watched.data_dir)
    watched.assert_nothing_left()


@pytest.mark.parametrize("moment_s", [0.3, 3.0])
def test_sigint_to_the_group_leaves_nothing(watched: Watched, moment_s: float) -> None:
    watched.watch_for(moment_s)
    watched.signal(signal.SIGINT)
    watched.look()
    watched.process.wait(timeout=30)
    watched.assert_nothing_left()


def test_down_ends_a_living_up_and_leaves_nothing(watched: Watched) -> None:
    record = watched.wait_until_ready()
    report = end_quietly(watched.data_dir)
    assert report.ended_by_up
    assert watched.process.wait(timeout=5) == 0
    assert not Path(record.temp_dir).exists()
    watched.assert_nothing_left()


def test_up_cleans_up_after_one_that_was_killed(watched: Watched) -> None:
    first = watched.wait_until_ready()
    watched.signal(signal.SIGKILL)
    watched.process.wait()
    again = Watched(watched.data_dir)
    try:
        deadline = time.monotonic() + 60
        while (
            (second := again.look()) is None
            or second.stack_id == first.stack_id
            or second.phase != "ready"
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert second.url == first.url, (
            "a data dir keeps its address while the port is free"
        )
        assert members(entry.session for entry in first.sessions) == []
        assert not Path(first.temp_dir).exists()
    finally:
        again.signal(signal.SIGTERM)
        again.process.wait(timeout=30)
    again.assert_nothing_left()


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_any_moment_will_do(watched: Watched, number: signal.Signals, seed: int) -> None:
    watched.watch_for(random.Random(f"{seed}{number}").uniform(0.0, 7.0))
    watched.signal(number)
    watched.look()
    watched.process.wait(timeout=30)
    watched.look()
    if number == signal.SIGKILL:
        end_quietly(watched.data_dir)
    watched.assert_nothing_left()
