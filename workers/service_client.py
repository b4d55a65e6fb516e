"""The way to the service: outwards over HTTP, nothing else.

Owns: the internal routes and the classes of their failures.

Used by the agent and by drivers, each thread with a link of its own. Must not know:
Ray, torch, what the messages mean.
"""

from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from workers.exceptions import WorkersError
from workers.protocol.wire import (
    PROTOCOL,
    AgentReport,
    CheckResult,
    CursorReply,
    DesiredJob,
    DesiredReply,
    RecordBatch,
    RecordReply,
)

Reply = TypeVar("Reply", bound=BaseModel)

_TIMEOUT_S = 10.0
_POLL_SLACK_S = 10.0


class ServiceUnavailableError(WorkersError):
    """The service did not answer, or not sensibly: try again later."""


class ServiceRefusedError(WorkersError):
    """The service understood and said no; `status` and `code` are those of its problem
    document.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"the service refused ({status} {code}): {detail}")
        self.status = status
        self.code = code


class ReplacedError(WorkersError):
    """A newer incarnation of this driver has spoken to the service: this one must end."""


class Hello(BaseModel):
    """Who the service is."""

    protocol: int
    namespace: str
    deployment_id: str
    storage_root: str | None = None
    """Folder or URI that jobs write below; nodes that do not see it are refused."""


class ServiceClient:
    """Requests of one caller with one token.

    Raises ServiceUnavailableError, ServiceRefusedError, Replaced.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=_TIMEOUT_S,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def hello(self) -> Hello:
        """First words; raises ServiceRefusedError when the service speaks a protocol
        that this code does not.
        """
        hello = Hello.model_validate(self._get("/internal/v1/agent/hello"))
        if hello.protocol not in (PROTOCOL, PROTOCOL + 1):
            raise ServiceRefusedError(
                426,
                "protocol",
                f"it speaks protocol {hello.protocol}, this agent {PROTOCOL}; install "
                "matching versions",
            )
        return hello

    def report(self, report: AgentReport) -> None:
        """The cluster as it is."""
        self._post("/internal/v1/agent/report", report)

    def desired_jobs(self, cluster: str, after: int, wait_s: float) -> DesiredReply:
        """What the cluster's jobs should be doing; waits for a revision above `after`."""
        query = {"cluster": cluster, "after": after, "wait_s": wait_s}
        return self._parse(
            DesiredReply, self._get("/internal/v1/agent/desired", query, wait_s)
        )

    def check_result(self, result: CheckResult) -> None:
        """What was wrong with a spec's paths."""
        self._post("/internal/v1/agent/checks", result)

    def cursor(self, job_id: str, epoch: int) -> CursorReply:
        """What is stored of a job's sources."""
        return self._parse(
            CursorReply, self._get(f"/internal/v1/jobs/{job_id}/cursor", {"epoch": epoch})
        )

    def records(self, batch: RecordBatch) -> RecordReply:
        """Stores records; the answer says up to where."""
        return self._parse(
            RecordReply, self._post(f"/internal/v1/jobs/{batch.job_id}/records", batch)
        )

    def desired_job(self, job_id: str, after: int, wait_s: float) -> DesiredJob:
        """What one job should be doing; waits for a revision above `after`."""
        query = {"after": after, "wait_s": wait_s}
        return self._parse(
            DesiredJob, self._get(f"/internal/v1/jobs/{job_id}/desired", query, wait_s)
        )

    def _get(
        self, path: str, query: dict[str, Any] | None = None, wait_s: float = 0.0
    ) -> Any:
        return self._send("GET", path, params=query, timeout=wait_s + _POLL_SLACK_S)

    def _post(self, path: str, message: BaseModel) -> Any:
        return self._send(
            "POST",
            path,
            content=message.model_dump_json(),
            headers={"Content-Type": "application/json"},
        )

    def _send(self, method: str, path: str, **request: Any) -> Any:
        try:
            response = self._client.request(method, path, **request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceUnavailableError(
                f"{method} {self.url}{path}: {type(error).__name__}: {error}"
            ) from error
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise ServiceUnavailableError(
                f"{method} {self.url}{path}: {response.status_code}"
            )
        try:
            body = response.json()
        except ValueError as error:
            raise ServiceUnavailableError(
                f"{method} {self.url}{path}: {response.status_code} without JSON; is that "
                "the service?"
            ) from error
        if response.status_code >= 400:
            problem = body if isinstance(body, dict) else {}
            code = str(problem.get("code", ""))
            detail = str(problem.get("detail", ""))
            if response.status_code == 409 and code == "fenced":
                raise ReplacedError(detail or "a newer driver of this job is at work")
            raise ServiceRefusedError(response.status_code, code, detail)
        return body

    @staticmethod
    def _parse(kind: type[Reply], body: Any) -> Reply:
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            raise ServiceUnavailableError(
                f"an answer that is no {kind.__name__}: {error}"
            ) from error
