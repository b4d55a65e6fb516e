"""The service's internal API in a hundred lines, in memory: enough to see what agent
and drivers say, and to go away and come back.
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "test"
AGENT_TOKEN = "agent-token"


class FakeService:
    """One cluster's jobs; `records[(job_id, source)]` is everything stored, in order."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.records: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.terminal: set[str] = set()
        self.job_states: dict[str, str] = {}
        self.epochs: dict[str, int] = {}
        self.last_ns: list[int] = []
        self.reports: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.check_results: list[dict[str, Any]] = []
        self.revision = 0
        self.refused: list[str] = []
        self._server: ThreadingHTTPServer | None = None

    # ---- what a test does

    def up(self, port: int = 0) -> None:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(
                    json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )

            def _answer(self, body: Any) -> None:
                if service._server is not self.server:
                    self.close_connection = (
                        # down: connections that are still open get no answer either
                        True
                    )
                    return
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                status, reply = service.route(
                    url.path, query, body, self.headers["Authorization"]
                )
                text = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that was cut off

        self._server = Server(("127.0.0.1", port), Handler)
        threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        ).start()

    def down(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def want(self, job_id: str, **changes: Any) -> None:
        with self.changed:
            self.revision += 1
            self.jobs[job_id] = {
                "token": f"token-{job_id}",
                **self.jobs.get(job_id, {}),
                "job_id": job_id,
                **changes,
                "revision": self.revision,
            }
            self.changed.notify_all()

    def stored(
        self, job_id: str, source: str = "driver", kind: str | None = None
    ) -> list[dict[str, Any]]:
        with self.changed:
            records = self.records.get((job_id, source), [])
            return [record for record in records if kind is None or record["kind"] == kind]

    def states(self, job_id: str) -> list[str]:
        return [record["data"]["state"] for record in self.stored(job_id, kind="state")]

    def events(self, job_id: str, type_: str) -> list[dict[str, Any]]:
        return [
            record["data"]
            for record in self.stored(job_id, kind="event")
            if record["data"]["type"] == type_
        ]

    def steps(self, job_id: str, attempt: int) -> list[int]:
        return [
            record["data"]["step"]
            for record in self.stored(job_id, f"a{attempt}/r0", "step")
        ]

    def wait(self, what: str, condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answer = condition()
            if answer:
                return answer
            with self.changed:
                self.changed.wait(0.05)
        newest = [
            f"{key[1]} {record['kind']} "
            f"{record['data'].get('state', record['data'].get('type', ''))} "
            f"{record['data'].get('message', '')}"
            for key, records in self.records.items()
            for record in [row for row in records if row["kind"] != "step"][-12:]
        ]
        raise AssertionError(
            f"waited {timeout_s} s for {what}; newest records:\n" + "\n".join(newest)
        )

    # ---- routes

    def route(
        self, path: str, query: dict[str, str], body: Any, authorization: str
    ) -> tuple[int, Any]:
        parts = path.strip("/").split("/")[2:]
        expected = AGENT_TOKEN if parts[0] == "agent" else f"token-{parts[1]}"
        if authorization != f"Bearer {expected}":
            self.refused.append(path)
            return 401, {"code": "unauthorized", "detail": "wrong token"}
        if parts[0] == "agent":
            return 200, self._agent(parts[1], query, body)
        return self._job(parts[1], parts[2], query, body)

    def _agent(self, verb: str, query: dict[str, str], body: Any) -> Any:
        if verb == "hello":
            return {"protocol": 1, "namespace": NAMESPACE, "deployment_id": NAMESPACE}
        with self.changed:
            if verb == "report":
                self.reports.append(body)
            elif verb == "checks":
                self.check_results.append(body)
                self.checks = [
                    check for check in self.checks if check["check_id"] != body["check_id"]
                ]
            else:
                self._await(query, lambda: self.revision)
                jobs = [
                    job for job in self.jobs.values() if job["job_id"] not in self.terminal
                ]
                return {
                    "revision": self.revision,
                    "jobs": jobs,
                    "terminal": sorted(self.terminal),
                    "checks": self.checks,
                    "states": self.job_states,
                }
            self.changed.notify_all()
        return {"ok": True}

    def _job(
        self, job_id: str, verb: str, query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        with self.changed:
            epoch = int(query.get("epoch", 0)) or (body or {}).get("epoch", 0)
            if epoch and epoch < self.epochs.get(job_id, 0):
                return 409, {"code": "fenced", "detail": f"epoch {epoch} is over"}
            self.epochs[job_id] = max(epoch, self.epochs.get(job_id, 0))
            if verb == "cursor":
                self.last_ns.append(int(query["last_n"]))
                return 200, {
                    "stored": {
                        source: len(records)
                        for (job, source), records in self.records.items()
                        if job == job_id
                    }
                }
            if verb == "desired":
                self._await(query, lambda: self.jobs[job_id]["revision"])
                return 200, self.jobs[job_id]
            stored = self.records.setdefault((job_id, body["source"]), [])
            for record in body["records"]:
                if record["n"] == len(stored) + 1:
                    stored.append(record)
                elif record["n"] > len(stored):
                    return 422, {
                        "code": "gap",
                        "detail": f"n={record['n']} after {len(stored)}",
                    }
                if record["kind"] == "state" and record["data"]["state"] in (
                    "succeeded",
                    "failed",
                    "cancelled",
                ):
                    self.terminal.add(job_id)
                    self.revision += 1
            self.changed.notify_all()
            return 200, {"stored": len(stored), "desired": self.jobs[job_id]}

    def _await(self, query: dict[str, str], revision: Callable[[], int]) -> None:
        deadline = time.monotonic() + float(query.get("wait_s", 0))
        while (
            revision() <= int(query.get("after", 0))
            and time.monotonic() < deadline
            and self._server is not None
        ):
            self.changed.wait(0.1)
