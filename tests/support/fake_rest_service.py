"""A scripted HTTP service for the command line's tests, with an example job."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SPEC = """
name: tiny
model: {preset: gpt-tiny}
data: {train: [{path: corpus.txt}], tokenizer: {kind: bytes}}
training: {seq_length: 64, global_batch_size: 4, steps: 10}
optimizer: {lr: 0.001}
"""
JOB: dict[str, Any] = {
    "object": "job",
    "id": "job-abc",
    "name": "tiny",
    "status": "running",
    "status_reason": None,
    "message": "",
    "created_at": "2026-11-20T20:00:00+00:00",
    "attempt": 1,
    "failures": 0,
    "progress": {
        "step": 5,
        "steps": 10,
        "loss": 3.25,
        "tokens_per_s": 1000.0,
        "eta_s": 12,
        "val_loss": None,
    },
    "storage_path": "/data/jobs/job-abc",
    "last_checkpoint": {
        "step": 5,
        "path": "/data/jobs/job-abc/checkpoints/step-00000005-a0001",
    },
    "problem": None,
    "resolved_spec": {"training": {"steps": 10, "global_batch_size": 4, "seq_length": 64}},
}


class FakeService:
    """Routes `METHOD /path` to (status, body); of a list, each request gets the next
    body, and the last one repeats.
    """

    def __init__(self) -> None:
        self.routes: dict[str, tuple[int, Any]] = {}
        self.requests: list[tuple[str, Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(length)
                fake.requests.append(
                    (f"{self.command} {self.path}", json.loads(sent) if sent else None)
                )
                detail = f"there is no {self.path}"
                problem = {"pointer": "/path/job_id", "code": "no_job", "detail": detail}
                missing = (
                    404,
                    {"code": "not_found", "detail": detail, "errors": [problem]},
                )
                status, body = fake.routes.get(
                    f"{self.command} {self.path.partition('?')[0]}", missing
                )
                if isinstance(body, list):
                    body = body.pop(0) if len(body) > 1 else body[0]
                payload = (
                    body.encode() if isinstance(body, str) else json.dumps(body).encode()
                )
                self.send_response(status)
                self.send_header(
                    "Content-Type",
                    "text/event-stream" if isinstance(body, str) else "application/json",
                )
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


Run = Callable[..., tuple[int, str, str]]


def stream(*events: tuple[str, Any]) -> str:
    return "".join(
        f"event: {name}\nid: {index}.0\ndata: {json.dumps(data)}\n\n"
        for index, (name, data) in enumerate(events, 1)
    )
