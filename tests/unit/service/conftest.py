"""A real service on a real socket, and an agent and drivers that speak its internal
HTTP API.
"""

import copy
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import sqlalchemy as sa
import uvicorn

from service.app import create_app
from service.main import Server, bind
from service.settings import Settings
from tests.support.service_tokens import AGENT_TOKEN, USER_TOKEN, tokens_file
from workers.protocol.wire import PROTOCOL, DesiredReply

Json = dict[str, Any]

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


def node(name: str = "n1", *, cpus: float = 4, gpus: float = 0, **more: Any) -> Json:
    return {
        "node_id": name,
        "address": f"10.0.0.{name[-1]}",
        "cpus": cpus,
        "gpus": gpus,
        **more,
    }


class Running:
    """One service process's worth of service, in a thread; `restart` starts another
    over the same data.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._clients: list[httpx.Client] = []
        self._start()

    def _start(self) -> None:
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(self.settings)
        self.app = app
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=3
        )
        self._server = Server(config, app.state.notifier, self.settings.port_file)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}
        )
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the service did not start"
            time.sleep(0.005)
        self.user = self.client(USER_TOKEN)
        self.agent = Agent(self.client(AGENT_TOKEN))

    def client(self, token: str | None, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=30,
            trust_env=False,
            verify=False,  # loading all certificates takes longer than most tests
            **options,
        )
        self._clients.append(client)
        return client

    def submit(self, spec: Json | None = None, **headers: str) -> Json:
        response = self.user.post(
            "/v1/jobs", json=SPEC if spec is None else spec, headers=headers
        )
        assert response.status_code == 201, response.text
        job: Json = response.json()
        return job

    def job(self, job_id: str) -> Json:
        response = self.user.get(f"/v1/jobs/{job_id}")
        assert response.status_code == 200, response.text
        job: Json = response.json()
        return job

    def events(self, job_id: str) -> list[Json]:
        response = self.user.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000})
        events: list[Json] = response.json()["data"]
        return events

    def driver(self, job_id: str, epoch: int = 1) -> "Driver":
        desired = next(job for job in self.agent.desired().jobs if job.job_id == job_id)
        return Driver(self.client(desired.token), job_id, epoch)

    def running_job(self, spec: Json | None = None) -> tuple[str, "Driver"]:
        """A job in state running, attempt 1."""
        self.agent.report(node())
        job_id = self.submit(spec)["id"]
        driver = self.driver(job_id)
        driver.send(("prepared", {"manifest": {}, "unigram_nats": 5.5}))
        driver.states("scheduling")
        driver.send(("attempt", {"state": "starting", "world_size": 4}), attempt=1)
        driver.states("starting", "running", attempt=1)
        return job_id, driver

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def restart(self) -> None:
        self.stop()
        self._start()


class Agent:
    """Speaks as the agent of cluster `default`."""

    def __init__(self, client: httpx.Client) -> None:
        self.http = client
        self._answering: threading.Thread | None = None
        self._stop = threading.Event()

    def report(self, *nodes: Json, **more: Any) -> None:
        body = {
            "protocol": PROTOCOL,
            "cluster": "default",
            "agent_id": "agent-1",
            "code_version": "1",
            "ray_version": "2.60",
        }
        response = self.http.post(
            "/internal/v1/agent/report",
            json={**body, "namespace": "ns", "nodes": list(nodes), **more},
        )
        assert response.json() == {"ok": True}, response.text

    def desired(self, after: int = -1, wait_s: float = 0) -> DesiredReply:
        response = self.http.get(
            "/internal/v1/agent/desired",
            params={"cluster": "default", "after": after, "wait_s": wait_s},
            timeout=wait_s + 10,
        )
        assert response.status_code == 200, response.text
        return DesiredReply.model_validate(response.json())

    def answer_checks(self, *problems: Json, notes: tuple[str, ...] = ()) -> None:
        """From now on every question gets this answer, until `stop`."""

        def answer_all() -> None:
            after = -1
            while not self._stop.is_set():
                reply = self.desired(after, 1.0)
                after = reply.revision
                for check in (*reply.checks, *reply.resume_checks):
                    answer = {"problems": problems, "notes": notes}
                    self.http.post(
                        "/internal/v1/agent/checks",
                        json={"check_id": check.check_id, **answer},
                    )

        self._answering = threading.Thread(target=answer_all)
        self._answering.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._answering is not None:
            self._answering.join(10)


class Driver:
    """Speaks as one job's driver; numbers its records by itself."""

    def __init__(self, client: httpx.Client, job_id: str, epoch: int = 1) -> None:
        self.http = client
        self.job_id = job_id
        self.epoch = epoch
        self.next_n: dict[str, int] = {}

    def post(self, source: str, records: list[Json], **more: Any) -> httpx.Response:
        body = {
            "protocol": PROTOCOL,
            "job_id": self.job_id,
            "epoch": self.epoch,
            "source": source,
            "records": records,
            **more,
        }
        return self.http.post(
            f"/internal/v1/jobs/{self.job_id}/records",
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )

    def number(self, source: str, *facts: tuple[str, Json], attempt: int = 0) -> list[Json]:
        first = self.next_n.get(source, 1)
        self.next_n[source] = first + len(facts)
        return [
            {
                "n": first + i,
                "at": 1.7e9 + i,
                "kind": kind,
                "attempt": attempt,
                "data": data,
            }
            for i, (kind, data) in enumerate(facts)
        ]

    def send(
        self, *facts: tuple[str, Json], source: str = "driver", attempt: int = 0
    ) -> Json:
        response = self.post(source, self.number(source, *facts, attempt=attempt))
        assert response.status_code == 200, response.text
        reply: Json = response.json()
        return reply

    def states(self, *states: str, attempt: int = 0, **more: Any) -> Json:
        return self.send(
            *(("state", {"state": state, **more}) for state in states), attempt=attempt
        )

    def steps(self, first: int, last: int, attempt: int = 1, **more: Any) -> Json:
        return self.send(
            *(("step", step_row(step, **more)) for step in range(first, last + 1)),
            source=f"a{attempt}/r0",
            attempt=attempt,
        )

    def cursor(self) -> httpx.Response:
        return self.http.get(
            f"/internal/v1/jobs/{self.job_id}/cursor", params={"epoch": self.epoch}
        )

    def desired(self, after: int = -1, wait_s: float = 0) -> Json:
        response = self.http.get(
            f"/internal/v1/jobs/{self.job_id}/desired",
            params={"after": after, "wait_s": wait_s},
        )
        assert response.status_code == 200, response.text
        reply: Json = response.json()
        return reply


def step_row(step: int, **more: Any) -> Json:
    row = {
        "step": step,
        "loss": 9.0 - 0.01 * step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "num_tokens": 1024,
        "consumed_samples": 8 * step,
    }
    return {
        **row,
        "step_s": 0.5,
        "tokens_per_s": 2048.0,
        "mfu": 0.1,
        "memory_bytes": 1 << 30,
        "split_s": {"data": 0.01},
        **more,
    }


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Iterator[Callable[[], str | None]]:
    """URLs of fresh databases, gone at the end: None for SQLite's in the data dir,
    which --postgres does not replace.
    """
    server = request.config.getoption("--postgres")
    names = []
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT") if server else None

    def make() -> str | None:
        if engine is None:
            return None
        names.append(f"mr_{uuid.uuid4().hex}")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {names[-1]}"))
        return (
            sa.make_url(server)
            .set(database=names[-1])
            .render_as_string(hide_password=False)
        )

    yield make
    if engine is not None:
        with engine.connect() as connection:
            for name in names:
                connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()


@pytest.fixture
def settings(tmp_path: Path, new_database: Callable[[], str | None]) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=new_database(),
        tokens_file=tokens_file(tmp_path),
        check_wait_s=0.05,
        ping_s=0.5,
        single_user=True,
    )


@pytest.fixture
def start() -> Iterator[Callable[[Settings], Running]]:
    """Starts services that end with the test."""
    started: list[Running] = []

    def begin(settings: Settings) -> Running:
        started.append(Running(settings))
        return started[-1]

    yield begin
    for service in started:
        service.stop()


@pytest.fixture
def service(settings: Settings, start: Callable[[Settings], Running]) -> Running:
    """A service with tokens, whose agent never answers a check."""
    return start(settings)


@pytest.fixture
def spec() -> Json:
    """A valid spec, to be changed at will."""
    return copy.deepcopy(SPEC)


@pytest.fixture
def make_node() -> Callable[..., Json]:
    return node


@pytest.fixture
def make_step() -> Callable[..., Json]:
    return step_row


@pytest.fixture(scope="session")
def start_service() -> Callable[[Settings], Running]:
    """For fixtures of a wider scope, which stop what they start."""
    return Running


@pytest.fixture(scope="session")
def new_node() -> Callable[..., Json]:
    return node
