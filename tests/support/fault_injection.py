"""What the tests that kill things share: who is who among a stack's processes, a
service kept away, a rank's own file, what is left.

Random moments come from one seed, printed by every test that uses it; MEGATRON_RAY_SEED
replays it.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.local_stack.ray_head import ray_environment
from service.local_stack.sessions import Session, members, read_process, send_signal
from tests.support.running_stack import ENDS, Road

SEED = int(os.environ.get("MEGATRON_RAY_SEED") or random.SystemRandom().randrange(1 << 31))
OBSERVER = Path(__file__).parent / "ray_observer.py"
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def dice(name: str) -> random.Random:
    """Random numbers of one test; prints how to have them again."""
    sys.stdout.write(f"{name}: MEGATRON_RAY_SEED={SEED}\n")
    return random.Random(f"{SEED}-{name}")


def until(what: str, condition: Callable[[], Any], timeout_s: float) -> Any:
    """The first answer that is not false.

    Raises AssertionError when there is none in time.
    """
    answer = wait_until(condition, timeout_s)
    assert answer, f"not in {timeout_s:g} s: {what}"
    return answer


def wait_until(condition: Callable[[], Any], timeout_s: float) -> Any:
    """The first answer that is not false, or the last one when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer or time.monotonic() > deadline:
            return answer
        time.sleep(0.05)


class Observer:
    """Ray's own word on what it holds, over a process of its own; follows the stack to
    a new Ray head.
    """

    def __init__(self, road: Road) -> None:
        self._road = road
        self._process: subprocess.Popen[str] | None = None
        self._address = ""
        self._lock = threading.Lock()

    def look(self) -> dict[str, Any]:
        """{actors, groups, objects}; asks again while Ray cannot tell."""
        return dict(until("an answer of Ray", self._try, 90))

    def actors(self, job_id: str) -> dict[str, int]:
        """Living processes of a job by role: `driver`, `w<slot>`."""
        rows = (self._try() or {"actors": []})["actors"]
        return {
            row["name"].partition("/")[2]: row["pid"]
            for row in rows
            if row["name"].startswith(f"{job_id}/") and row["state"] == "ALIVE"
        }

    def hold(self) -> None:
        """Takes one CPU."""
        assert self._ask("hold") == {"held": True}

    def release(self) -> None:
        """Gives it back."""
        self._ask("release")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _try(self) -> dict[str, Any] | None:
        answer = self._ask("look")
        return None if answer is None or "failed" in answer else answer

    def _ask(self, word: str) -> dict[str, Any] | None:
        """None: Ray is away, or went away meanwhile."""
        # Faults that strike at once ask from several threads.
        with self._lock:
            return self._ask_alone(word)

    def _ask_alone(self, word: str) -> dict[str, Any] | None:
        record = self._road.record
        if (
            self._process is None
            or self._process.poll() is not None
            or self._address != record.ray_address
        ):
            self.close()
            self._address = record.ray_address
            environment = {
                **os.environ,
                **ray_environment(record.ray_token, Path(record.temp_dir)),
            }
            self._process = subprocess.Popen(
                [sys.executable, OBSERVER, self._address],
                env={
                    name: value for name, value in environment.items() if value is not None
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return dict(json.loads(line)) if line else None


@contextmanager
def observed(road: Road) -> Iterator[Observer]:
    """An observer for the length of a module."""
    observer = Observer(road)
    try:
        yield observer
    finally:
        observer.close()


def session(road: Road, name: str) -> Session:
    """The session of `ray`, `service` or `agent`."""
    return next(entry.session for entry in road.record.sessions if entry.name == name)


def kill_session(target: Session) -> None:
    """SIGKILLs all of a session; its zombies are left to their parent."""

    def gone() -> bool:
        alive = [process for process in members([target]) if process.state != "Z"]
        for process in alive:
            send_signal(process.pid, process.start_ticks, signal.SIGKILL)
        return not alive

    until(f"the end of session {target.sid}", gone, 20)


def kill(pid: int) -> None:
    """SIGKILLs one process and waits until it has ended; one that is gone already is
    fine.
    """
    process = read_process(pid)
    if process is not None and send_signal(pid, process.start_ticks, signal.SIGKILL):
        until(
            f"the end of {pid}",
            lambda: (
                (now := read_process(pid)) is None
                or now.start_ticks != process.start_ticks
                or now.state == "Z"
            ),
            20,
        )


@contextmanager
def service_away(road: Road) -> Iterator[None]:
    """SIGKILLs the service and keeps it away: `up` is stopped and the port taken by
    a process that never answers.

    Afterwards `up` goes on and starts the service on another port.
    """
    record = road.record
    send_signal(record.up_pid, record.up_start_ticks, signal.SIGSTOP)
    try:
        kill_session(session(road, "service"))
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A killed process shows as a zombie while its threads still hold the port.
            until(
                "the service's port to be free",
                lambda: listens(taken, httpx.URL(record.url).port or 0),
                20,
            )
            try:
                yield
            finally:
                send_signal(record.up_pid, record.up_start_ticks, signal.SIGCONT)
                until(
                    "the service on another port",
                    lambda: road.record.url != record.url and road.answers(),
                    120,
                )
    finally:
        send_signal(record.up_pid, record.up_start_ticks, signal.SIGCONT)


def listens(taken: socket.socket, port: int) -> bool:
    """Takes a port; one that is only bound could still be had with SO_REUSEADDR, hence
    the listening.
    """
    try:
        taken.bind(("127.0.0.1", port))
    except OSError:
        return False
    taken.listen(0)
    return True


class RankFile:
    """Rank 0's own files of all attempts, kept by hard links beyond the job's end; a
    thread looks for new ones.
    """

    def __init__(self, road: Road, job_id: str) -> None:
        self._temp_dir = Path(road.record.temp_dir)
        self._job_id = job_id
        self._kept = self._temp_dir / "kept" / job_id
        self._kept.mkdir(parents=True)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __enter__(self) -> "RankFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def lines(self, attempt: int | None = None) -> list[dict[str, Any]]:
        """Reports in the order of writing."""
        paths = sorted(self._kept.iterdir())
        rows = [
            json.loads(text)
            for path in paths
            for text in path.read_bytes().splitlines(keepends=True)
            if text.endswith(b"\n")
        ]
        return sorted(
            (line for line in rows if attempt in (None, line["attempt"])),
            key=lambda line: (line["attempt"], line["n"]),
        )

    def steps(self, attempt: int | None = None) -> list[dict[str, Any]]:
        """{step, at, loss, grad_norm, attempt} of each step."""
        keep = ("step", "loss", "grad_norm")
        rows = [line for line in self.lines(attempt) if line["kind"] == "step"]
        return [
            {
                "at": row["at"],
                "attempt": row["attempt"],
                **{key: row["data"][key] for key in keep},
            }
            for row in rows
        ]

    def reached(
        self, step: int, timeout_s: float = 120, attempt: int | None = None
    ) -> None:
        """Waits until the rank has done a step, whichever others live."""
        until(
            f"step {step} in the rank's own file",
            lambda: any(row["step"] >= step for row in self.steps(attempt)),
            timeout_s,
        )

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for path in self._temp_dir.glob(
                f"*/session_2*/megatron-ray/{self._job_id}/attempt-*/rank-00000.jsonl*"
            ):
                kept = self._kept / f"{path.parents[3].name}-{path.parent.name}-{path.name}"
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    os.link(path, kept)


def values(rows: Sequence[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """What must be equal bit for bit."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def history(road: Road, job_id: str) -> list[dict[str, Any]]:
    """All events of a job."""
    events: list[dict[str, Any]] = []
    while True:
        page = road.client.events(
            job_id, limit=1000, after=events[-1]["id"] if events else None
        )
        events += page["data"]
        if not page["has_more"]:
            return events


def story(road: Road, job_id: str) -> str:
    """The history as a person reads it; for messages of failed tests."""
    rows = history(road, job_id)
    return "\n".join(
        f"{row['seq']:4} {row['created_at']} a{row['attempt']} {row['type']}: "
        f"{row['message'][:200]}"
        for row in rows
    )


def assert_as_undisturbed(
    road: Road, job: dict[str, Any], undisturbed: Sequence[dict[str, Any]]
) -> None:
    """Succeeded, every step there once, losses and norms bit for bit, a history without
    gaps.
    """
    log = story(road, job["id"])
    assert job["status"] == "succeeded", f"{job['status']}: {job['message']}\n{log}"
    rows = road.rows(job["id"])
    missing = sorted({row["step"] for row in undisturbed} - {row["step"] for row in rows})
    assert not missing, f"steps missing: {missing}\n{log}"
    assert len(rows) == len(undisturbed), f"{len(rows)} rows\n{log}"
    differing = [
        step
        for (step, *measured), (_, *expected) in zip(
            values(rows), values(undisturbed), strict=True
        )
        if measured != expected
    ]
    assert not differing, f"loss or norm differ at steps {differing}\n{log}"
    assert [event["seq"] for event in history(road, job["id"])] == list(
        range(1, len(log.splitlines()) + 1)
    ), log


def left_of(
    road: Road, observer: Observer, job_ids: Sequence[str], sessions: Sequence[Session] = ()
) -> dict[str, Any]:
    """Actors, placement groups, processes and folders of these jobs; {} when nothing is
    left. `sessions` are those of joined nodes.
    """
    seen = observer.look()
    ours = [row for row in seen["actors"] if row["name"].partition("/")[0] in job_ids]
    others = {row["pid"] for row in seen["actors"] if row not in ours}
    folders = [
        str(path)
        for job_id in job_ids
        for path in Path(road.record.temp_dir).glob(
            f"*/session_latest/megatron-ray/{job_id}"
        )
    ]
    left = {
        "actors": ours,
        "groups": [row for row in seen["groups"] if row["name"] in job_ids],
        "processes": [
            (pid, title) for pid, title in busy_workers(road, sessions) if pid not in others
        ],
        "folders": folders,
    }
    return {name: rows for name, rows in left.items() if rows}


def busy_workers(road: Road, sessions: Sequence[Session] = ()) -> list[tuple[int, str]]:
    """Ray's worker processes that do something: (pid, title)."""
    busy = []
    for process in members([session(road, "ray"), *sessions]):
        try:
            title = (
                Path(f"/proc/{process.pid}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")
                .strip()
            )
        except OSError:
            continue
        if title.startswith("ray::") and not title.startswith(RAYS_OWN):
            busy.append((process.pid, title))
    return busy


def assert_nothing_left(
    road: Road,
    observer: Observer,
    job_ids: Sequence[str],
    timeout_s: float = 20,
    sessions: Sequence[Session] = (),
) -> None:
    """Waits until nothing of ended jobs is left in Ray, in its processes and in its
    folder.
    """
    deadline = time.monotonic() + timeout_s
    while (
        left := left_of(road, observer, job_ids, sessions)
    ) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"left after {timeout_s:g} s: {json.dumps(left, indent=1)}"


def open_rows(road: Road) -> list[tuple[Any, ...]]:
    """Rows of the database that claim that something is still going on."""
    terminal = ", ".join(f"'{state}'" for state in ENDS)
    (path,) = road.data_dir.glob("service.db")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        jobs = database.execute(
            f"SELECT id, status, desired FROM jobs WHERE status NOT IN ({terminal}) OR "
            "ended_at IS NULL"
        ).fetchall()
        query = (
            "SELECT jobs.id, attempts.attempt, attempts.state FROM attempts JOIN jobs ON "
            "jobs.number = attempts.job"
        )
        attempts = database.execute(
            f"{query} WHERE attempts.ended_at IS NULL OR attempts.state IN ('starting', 'running')"
        ).fetchall()
    return [*jobs, *attempts]
