"""The service as a process of its own, killed and started again over the same data; and
an agent and a driver that speak to it.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import httpx

from tests.support.service_tokens import AGENT_TOKEN, USER_TOKEN, tokens_file
from workers.protocol.wire import PROTOCOL

Json = dict[str, Any]
START_S = 60.0
SPEC: Json = {
    "name": "tiny",
    "model": {"preset": "gpt-tiny"},
    "data": {
        "train": [{"path": "builtin://python-stdlib"}],
        "tokenizer": {"kind": "bpe", "vocab_size": 1024},
    },
    "training": {
        "seq_length": 128,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "steps": 20,
    },
    "optimizer": {"lr": 1e-3},
}


class ServiceProcess:
    """`python -m service.main` with one data dir; `address` is that of the newest
    start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "service.log"
        self.tokens_file = tokens_file(folder)
        self.user_token = USER_TOKEN
        self.agent_token = AGENT_TOKEN
        self.address = ("127.0.0.1", 0)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.kill()
        # Not hidden behind the failure of a test.
        if kind is None:
            assert logged_errors(self.log) == []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, port: int = 0) -> None:
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        variables = {
            "MEGATRON_RAY_DATA_DIR": str(self.folder / "data"),
            "MEGATRON_RAY_PORT": str(port),
            "MEGATRON_RAY_PORT_FILE": str(port_file),
            "MEGATRON_RAY_TOKENS_FILE": str(self.tokens_file),
            "MEGATRON_RAY_CHECK_WAIT_S": "0",  # no agent looks at paths here
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.main"],
                env={**os.environ, **variables},
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while not port_file.exists():
            assert self.process.poll() is None, (
                f"the service ended while starting:\n{self.log.read_text()}"
            )
            assert time.monotonic() < deadline, (
                f"the service has not started in {START_S:.0f} s:\n{self.log.read_text()}"
            )
            time.sleep(0.02)
        self.address = ("127.0.0.1", int(port_file.read_text()))

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=20)

    def client(self, token: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
            trust_env=False,
        )


def logged_errors(log: Path) -> list[str]:
    """The lines of a service's log that look like its faults: there must be none."""
    return [
        line
        for line in log.read_text(errors="replace").splitlines()
        if " ERROR " in line or " CRITICAL " in line or line.startswith("Traceback")
    ]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(client: httpx.Client, path: str, body: Any) -> Json:
    """The answer's JSON; anything but a success fails the test."""
    response = client.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code < 300, f"{path}: {response.status_code} {response.text}"
    return dict(response.json())


def report_nodes(agent: httpx.Client) -> None:
    """The agent reports one node with 4 CPUs."""
    body = {
        "protocol": PROTOCOL,
        "cluster": "default",
        "agent_id": "a",
        "code_version": "1",
        "ray_version": "2",
        "namespace": "n",
    }
    node = {"node_id": "n1", "address": "10.0.0.1", "cpus": 4}
    post(agent, "/internal/v1/agent/report", {**body, "nodes": [node]})


def job_token(agent: httpx.Client, job_id: str) -> str:
    """What the agent receives for the job's driver."""
    reply = agent.get(
        "/internal/v1/agent/desired",
        params={"cluster": "default", "after": -1, "wait_s": 0},
    ).json()
    return str(next(job["token"] for job in reply["jobs"] if job["job_id"] == job_id))


class Records:
    """Numbers a driver's records by source, as the workers do."""

    def __init__(self, job_id: str, epoch: int = 1) -> None:
        self.job_id = job_id
        self.epoch = epoch
        self._next: dict[str, int] = {}

    def batch(self, source: str, attempt: int, *facts: tuple[str, Json]) -> Json:
        """A batch ready to be sent, any number of times."""
        first = self._next.get(source, 1)
        self._next[source] = first + len(facts)
        records = [
            {
                "n": first + i,
                "at": 1.7e9 + i,
                "kind": kind,
                "attempt": attempt,
                "data": data,
            }
            for i, (kind, data) in enumerate(facts)
        ]
        return {
            "protocol": PROTOCOL,
            "job_id": self.job_id,
            "epoch": self.epoch,
            "source": source,
            "records": records,
        }


def step_row(step: int, attempt: int = 1) -> tuple[str, Json]:
    """A step's record; attempts differ in their loss."""
    row = {
        "step": step,
        "loss": 9.0 - 0.01 * step + attempt / 7,
        "grad_norm": 1 / 3,
        "lr": 1e-3,
        "num_tokens": 1024,
    }
    return "step", {
        **row,
        "consumed_samples": 8 * step,
        "step_s": 0.5,
        "tokens_per_s": 2048.5,
        "mfu": 0.1,
        "split_s": {"data": 0.01},
    }


def open_files(pid: int) -> tuple[int, int]:
    """(files of the database, all others)."""
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            names.append(os.readlink(entry))
    of_database = sum("/service.db" in name for name in names)
    return of_database, len(names) - of_database
