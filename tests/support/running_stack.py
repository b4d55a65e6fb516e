"""A stack as a user starts it, and shorthands for looking at it: what the tests of the
whole road share.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from service.local_stack.record import StackRecord, read_record
from service.local_stack.sessions import Session, members
from tests.support.service_process import logged_errors

CLI = Path(sys.executable).with_name("megatron-ray")
ENDS = ("succeeded", "failed", "cancelled")
SPEC: dict[str, Any] = {
    "name": "road",
    "model": {"preset": "gpt-tiny", "num_layers": 2, "hidden_size": 64},
    "parallel": {"tp": 2, "sequence_parallel": True},
    "training": {
        "seq_length": 64,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "steps": 60,
        "eval_samples": 8,
    },
    "optimizer": {"lr": 3e-3},
    "checkpoint": {"every_steps": 20},
}


@dataclass(frozen=True)
class WholeJob:
    """A job as it was at its end, with loss and norm of every step."""

    job: dict[str, Any]
    rows: list[dict[str, Any]]


class Road:
    """A running stack and shorthands for looking at it."""

    def __init__(self, data_dir: Path, corpus: Path) -> None:
        self.data_dir = data_dir
        self.corpus = corpus
        self._client: Client | None = None
        self._http = httpx.Client(
            timeout=5, trust_env=False
        )  # httpx.get would read all certificates each time: 40 ms of a core

    @property
    def client(self) -> Client:
        """Of the service, wherever it is now."""
        record = self.record
        if self._client is None or self._client.url != record.url:
            self._close_client()
            self._client = Client(record.url, record.token)
        return self._client

    def close(self) -> None:
        """Gives the connections back."""
        self._http.close()
        self._close_client()

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def record(self) -> StackRecord:
        record = read_record(self.data_dir)
        assert record is not None
        return record

    def spec(self, **groups: Any) -> dict[str, Any]:
        spec = {
            **SPEC,
            "data": {"train": [{"path": str(self.corpus)}], "tokenizer": {"kind": "bytes"}},
        }
        for name, fields in groups.items():
            spec[name] = (
                {**spec.get(name, {}), **fields} if isinstance(fields, dict) else fields
            )
        return spec

    def wait(
        self, job_id: str, reached: Callable[[dict[str, Any]], bool], timeout_s: float = 120
    ) -> dict[str, Any]:
        """Polls until it is so; a service that is away for a moment is no failure."""
        deadline = time.monotonic() + timeout_s
        job: dict[str, Any] = {}
        while time.monotonic() < deadline:
            try:
                response = self._http.get(
                    f"{self.record.url}/v1/jobs/{job_id}", headers=self.headers
                )
                job = response.json()
                if response.status_code == 200 and reached(job):
                    return job
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not reached in {timeout_s} s: {json.dumps(job)[:2000]}")

    def answers(self) -> bool:
        """Whether the service does."""
        try:
            return self._http.get(f"{self.record.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def finish(self, job_id: str, timeout_s: float = 120) -> dict[str, Any]:
        return self.wait(job_id, lambda job: job["status"] in ENDS, timeout_s)

    def step(self, job_id: str, step: int) -> dict[str, Any]:
        return self.wait(
            job_id, lambda job: ((job["progress"] or {}).get("step") or 0) >= step
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.record.token}"}

    def rows(self, job_id: str) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self.client.metrics(job_id, keys="loss,grad_norm")[
            "data"
        ]
        return data

    def pids(self, job_id: str) -> list[int]:
        return [entry["pid"] for entry in self.client.ranks(job_id)["data"]]

    def service_session(self) -> Session:
        (entry,) = [entry for entry in self.record.sessions if entry.name == "service"]
        return entry.session


@contextmanager
def stack(folder: Path) -> Iterator[Road]:
    """A stack of two CPUs in a fresh folder, with a small corpus; taken down at the
    end, and nothing may be left.
    """
    corpus = folder / "corpus"
    corpus.mkdir()
    for index in range(60):
        (corpus / f"{index}.txt").write_text(
            " ".join(str(index * number % 97) for number in range(400))
        )
    data_dir = folder / "stack"
    subprocess.run(
        [
            CLI,
            "up",
            "--detach",
            "--cpus",
            "2",
            "--ready-timeout-s",
            "240",
            "--data-dir",
            data_dir,
        ],
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    sessions = []
    try:
        started = Road(data_dir, corpus)
        try:
            yield started
        finally:
            started.close()
        sessions = [entry.session for entry in started.record.sessions]
    finally:
        subprocess.run(
            [CLI, "down", "--data-dir", data_dir],
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,
        )
    assert members(set(sessions)) == []
    for log in (data_dir / "logs").glob("service*.log"):
        assert logged_errors(log) == []
    for path in (data_dir, data_dir / "logs"):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (data_dir / "service.db", data_dir / "logs" / "service.log"):
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    with stack(tmp_path_factory.mktemp("road")) as started:
        yield started
