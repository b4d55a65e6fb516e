"""Calls the service's internal HTTP routes.

Owns: the routes and the classes of their failures.

Used by the agent and by drivers; each thread has its own client. Only the cluster sends
requests, never the service. Must not know: Ray, torch, the meaning of the messages.
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
"""Seconds that a long poll may take beyond its requested wait."""
_UPGRADE_REQUIRED = 426
_TRANSIENT_STATUSES = (408, 429)


class ServiceUnavailableError(WorkersError):
    """The service did not reply, or not as the protocol requires: try again later."""


class ServiceRefusedError(WorkersError):
    """The service refused a request.

    `status` and `code` are those of its problem document.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"the service refused ({status} {code}): {detail}")
        self.status = status
        self.code = code


# Not a ServiceRefusedError, which callers retry or log: after this error they must end.
class ReplacedError(WorkersError):
    """A newer incarnation of this driver has called the service, so this one must end."""


class Hello(BaseModel):
    """The service's identity and settings, for the agent."""

    protocol: int
    namespace: str
    deployment_id: str
    storage_root: str | None = None
    """Folder or URI that jobs write below; nodes that cannot read it are refused."""


class ServiceClient:
    """Sends requests of one caller with one token.

    Methods raise ServiceUnavailableError, ServiceRefusedError, ReplacedError.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=_TIMEOUT_S,
            # Proxies of the environment are ignored, because they could read the token.
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
        """Returns the service's settings; the agent's first request.

        Raises ServiceRefusedError when the service's protocol is not supported here.
        """
        hello = self._parse(Hello, self._get("/internal/v1/agent/hello"))
        # A service accepts its own protocol and the one before.
        if hello.protocol not in (PROTOCOL, PROTOCOL + 1):
            raise ServiceRefusedError(
                _UPGRADE_REQUIRED,
                "protocol",
                f"it uses protocol {hello.protocol}, this agent {PROTOCOL}; install "
                "matching versions",
            )
        return hello

    def report(self, report: AgentReport) -> None:
        """Sends the state of the cluster."""
        self._post("/internal/v1/agent/report", report)

    def desired_jobs(self, cluster: str, after: int, wait_s: float) -> DesiredReply:
        """Returns the desired state of a cluster's jobs.

        Waits up to `wait_s` for a revision above `after`.
        """
        query = {"cluster": cluster, "after": after, "wait_s": wait_s}
        body = self._get("/internal/v1/agent/desired", query, wait_s)
        return self._parse(DesiredReply, body)

    def check_result(self, result: CheckResult) -> None:
        """Sends the problems that a check of a spec's paths found."""
        self._post("/internal/v1/agent/checks", result)

    def cursor(self, job_id: str, epoch: int, last_n: int = 0) -> CursorReply:
        """Returns what the service has stored of each of a job's sources.

        `last_n` is the highest number of the driver's own records in the job's folder.
        """
        query = {"epoch": epoch, "last_n": last_n}
        body = self._get(f"/internal/v1/jobs/{job_id}/cursor", query)
        return self._parse(CursorReply, body)

    def records(self, batch: RecordBatch) -> RecordReply:
        """Stores records; the reply holds the highest number stored."""
        body = self._post(f"/internal/v1/jobs/{batch.job_id}/records", batch)
        return self._parse(RecordReply, body)

    def desired_job(self, job_id: str, after: int, wait_s: float) -> DesiredJob:
        """Returns the desired state of one job.

        Waits up to `wait_s` for a revision above `after`.
        """
        query = {"after": after, "wait_s": wait_s}
        body = self._get(f"/internal/v1/jobs/{job_id}/desired", query, wait_s)
        return self._parse(DesiredJob, body)

    def _get(
        self, path: str, query: dict[str, Any] | None = None, wait_s: float = 0.0
    ) -> Any:
        # The service answers a long poll after up to `wait_s`.
        return self._send("GET", path, params=query, timeout=wait_s + _POLL_SLACK_S)

    def _post(self, path: str, message: BaseModel) -> Any:
        return self._send(
            "POST",
            path,
            content=message.model_dump_json(),
            headers={"Content-Type": "application/json"},
        )

    def _send(self, method: str, path: str, **request: Any) -> Any:
        """Returns the JSON body of a successful response; raises what the class lists."""
        target = f"{method} {self.url}{path}"
        try:
            response = self._client.request(method, path, **request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceUnavailableError(
                f"{target}: {type(error).__name__}: {error}"
            ) from error
        status = response.status_code
        # Unlike a refusal, these errors may be temporary.
        if status >= 500 or status in _TRANSIENT_STATUSES:
            raise ServiceUnavailableError(f"{target}: {status}")
        try:
            body = response.json()
        except ValueError as error:
            # A proxy or another program replied; the service may be available later.
            raise ServiceUnavailableError(
                f"{target}: status {status} without JSON; check the service URL"
            ) from error
        if status >= 400:
            raise _refusal(status, body)
        return body

    @staticmethod
    def _parse(model: type[Reply], body: Any) -> Reply:
        try:
            return model.model_validate(body)
        except ValidationError as error:
            raise ServiceUnavailableError(
                f"the service's reply is not a valid {model.__name__}: {error}"
            ) from error


def _refusal(status: int, body: Any) -> ReplacedError | ServiceRefusedError:
    """Returns the exception for a problem document."""
    problem: dict[str, Any] = {}
    if isinstance(body, dict):
        problem = body
    code = str(problem.get("code", ""))
    detail = str(problem.get("detail", ""))
    # Other conflicts are ordinary refusals; this one ends the driver.
    if status == 409 and code == "fenced":
        return ReplacedError(detail or "a newer driver of this job is running")
    return ServiceRefusedError(status, code, detail)
