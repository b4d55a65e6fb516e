"""Jobs see each other by files, meet, and go on without one that is lost."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import Storage, open_storage
from megatron_ray.training.replica_jobs.heartbeats import Heartbeats, file_of
from megatron_ray.training.replica_jobs.membership import Heartbeat, Meeting
from megatron_ray.training.replica_jobs.rendezvous import Rendezvous

LOST_AFTER_S = 1.0


def no_watch() -> None:
    """Looks for nothing."""


class Job:
    """One job's first rank."""

    def __init__(
        self, folder: Path, group: int, groups: int = 2, start_timeout_s: float = 20
    ) -> None:
        self.folder = folder
        # A port that accepts connections, as the store of a living process does.
        self.server = socket.create_server(("127.0.0.1", 0))
        own = Heartbeat(group, f"job-{group}-{id(self)}", self.server.getsockname()[:2])
        storage = open_storage(str(folder))
        self.heartbeats = Heartbeats(storage, own, groups, LOST_AFTER_S, no_watch)
        self.rendezvous = Rendezvous(self.heartbeats, groups, start_timeout_s)
        self.stopped = threading.Event()

    def meet(self, step: int, *, done: bool = False) -> Meeting | None:
        return self.rendezvous.meet(
            step, "layout", self.stopped.is_set, has_synchronized=done
        )

    def end(self) -> None:
        self.heartbeats.close()
        self.server.close()

    def die(self) -> None:
        """Ends as by SIGKILL: the file stays, the port refuses."""
        file = self.folder / file_of(self.heartbeats.own.group)
        content = file.read_bytes()
        self.end()
        file.write_bytes(content)


@contextmanager
def jobs(folder: Path, number: int) -> Iterator[list[Job]]:
    """Jobs that have met before their first step."""
    made = [Job(folder, group, number) for group in range(number)]
    try:
        with ThreadPoolExecutor(number) as pool:
            meetings = list(pool.map(lambda job: job.meet(0, done=True), made))
        assert meetings[0] is not None
        assert meetings == [meetings[0]] * number
        yield made
    finally:
        for job in made:
            job.end()


def test_all_get_the_same_meetings(tmp_path: Path) -> None:
    with jobs(tmp_path, 3) as made, ThreadPoolExecutor(3) as pool:
        for step in (4, 8):
            meetings = list(pool.map(Job.meet, made, [step] * 3))
            assert meetings[0] is not None
            assert meetings == [meetings[0]] * 3
            assert [each.group for each in meetings[0].members] == [0, 1, 2]
            for job in made:
                job.rendezvous.has_met(meetings[0])


def test_a_job_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with jobs(tmp_path, 2) as (one, other), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.meet, 4)
        time.sleep(0.2)
        one.heartbeats.close()
        meeting = waiting.result(timeout=LOST_AFTER_S * 10)
        assert meeting is not None
        assert [each.group for each in meeting.members] == [1]
        assert not list(tmp_path.glob(file_of(0)))


@pytest.mark.parametrize("dies", [0, 1])
def test_a_job_that_is_killed_is_noticed_by_its_port(tmp_path: Path, dies: int) -> None:
    with jobs(tmp_path, 2) as made:
        made[dies].die()
        meeting = made[1 - dies].meet(8)
        assert meeting is not None
        assert [each.group for each in meeting.members] == [1 - dies]
        assert list(tmp_path.glob(file_of(dies)))


def test_a_file_that_was_left_behind_is_no_job(tmp_path: Path) -> None:
    Job(tmp_path, 0).die()
    job = Job(tmp_path, 1, start_timeout_s=0)
    try:
        assert list(job.heartbeats.living()) == [1]
        meeting = job.meet(0, done=True)
        assert meeting is not None
        assert [each.group for each in meeting.members] == [1]
    finally:
        job.end()


def test_a_job_that_comes_back_is_behind(tmp_path: Path) -> None:
    with jobs(tmp_path, 2) as made, ThreadPoolExecutor(2) as pool:
        made[0].die()
        assert made[1].meet(8) is not None
        made[0] = Job(tmp_path, 0)
        joins = pool.submit(made[0].meet, 0, done=True)
        # It appears with the next renewal of its file.
        deadline = time.monotonic() + 10
        while len(made[1].heartbeats.living()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        meeting = made[1].meet(12)
        assert joins.result(timeout=10) == meeting
        assert meeting is not None
        assert [each.group for each in meeting.members] == [1]
        assert [each.group for each in meeting.behind] == [0]
        assert not made[1].rendezvous.is_lost(meeting)
        made[0].heartbeats.close()
        made[1].heartbeats.read()
        assert made[1].rendezvous.is_lost(meeting)


def test_a_job_that_is_to_stop_waits_no_longer(tmp_path: Path) -> None:
    with jobs(tmp_path, 2) as (one, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.meet, 4)
        time.sleep(0.1)
        assert not waiting.done()
        one.stopped.set()
        assert waiting.result(timeout=10) is None


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_time_passes_while_the_folder_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    other = Job(tmp_path, 0)
    own = Heartbeat(1, "job-1", ("127.0.0.1", 1))
    storage = open_storage(str(tmp_path))
    heartbeats = Heartbeats(storage, own, 2, 60.0, no_watch, clock)
    try:
        deadline = time.monotonic() + 10
        while len(heartbeats.living()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            heartbeats.read()
        other.die()
        heartbeats.read()

        def refuse(self: Storage, name: str) -> bytes:
            raise StorageError("read", name, "out of order")

        with monkeypatch.context() as patch:
            patch.setattr(type(storage), "read_bytes", refuse)
            clock.now += 100
            heartbeats.read()
        assert len(heartbeats.living()) == 2
        heartbeats.read()
        clock.now += 100
        heartbeats.read()
        assert list(heartbeats.living()) == [1]
    finally:
        heartbeats.close()
