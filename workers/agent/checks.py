"""Questions that only the cluster can answer.

Owns: checks of a spec's paths, and whether every node sees the storage.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_ray.storage.errors import StorageError
from workers.data_tasks import check_task, nonce_matches, write_nonce
from workers.protocol.wire import CheckRequest, CheckResult, NodeInfo, ProblemMessage
from workers.ray.tasks import TaskFailedError, anywhere, is_done, on_node, result
from workers.service_client import (
    ServiceClient,
    ServiceRefusedError,
    ServiceUnavailableError,
)

_LOG = logging.getLogger("megatron_ray.agent")
_AGAIN_S = 300.0
_RETRY_S = 10.0
_REMEMBERED = 1000


class CheckRunner:
    """Each question is asked once, as a CPU task, and answered as soon as the task is
    done.
    """

    def __init__(self, link: ServiceClient) -> None:
        self._link = link
        self._seen: dict[str, None] = {}
        self._running: dict[str, Any] = {}

    @property
    def busy(self) -> bool:
        """Whether an answer is being waited for."""
        return bool(self._running)

    def take(self, requests: Iterable[CheckRequest]) -> None:
        """Starts what has not been started yet."""
        for request in requests:
            if request.check_id not in self._seen:
                self._seen[request.check_id] = None
                self._running[request.check_id] = anywhere(
                    check_task, request.spec, request.storage_path
                )
        while len(self._seen) > _REMEMBERED:
            self._seen.pop(next(iter(self._seen)))

    def answer(self) -> None:
        """Sends what is done; a lost answer is the service's timeout."""
        for check_id, call in list(self._running.items()):
            if not is_done(call):
                continue
            del self._running[check_id]
            try:
                problems = result(call)
            except TaskFailedError as failure:
                problems = [
                    {
                        "pointer": "",
                        "code": "check_failed",
                        "detail": f"the cluster could not look at the paths: {failure}",
                    }
                ]
            try:
                self._link.check_result(
                    CheckResult(
                        check_id=check_id,
                        problems=tuple(ProblemMessage(**row) for row in problems),
                    )
                )
            except (ServiceUnavailableError, ServiceRefusedError) as error:
                _LOG.warning("%s", error)


class StorageChecks:
    """Whether each node reads a word that this process wrote below the storage root."""

    def __init__(self, root: str | None) -> None:
        self._root = root
        self._nonce: tuple[str, str] | None = None
        self._results: dict[str, bool] = {}
        self._due: dict[str, float] = {}
        self._running: dict[str, Any] = {}

    def results(self) -> Mapping[str, bool]:
        """By node id, as far as known."""
        return self._results

    def look(self, nodes: Sequence[NodeInfo]) -> None:
        """Takes what is done, and asks the nodes whose turn it is; never waits."""
        if self._root is None:
            return
        now = time.monotonic()
        for node_id, call in list(self._running.items()):
            if is_done(call):
                del self._running[node_id]
                self._take(node_id, call, now)
        for node in nodes:
            if (
                node.alive
                and node.node_id not in self._running
                and now >= self._due.get(node.node_id, 0.0)
            ):
                self._ask(node.node_id, now)

    def _take(self, node_id: str, call: Any, now: float) -> None:
        try:
            self._results[node_id] = bool(result(call))
            self._due[node_id] = now + (_AGAIN_S if self._results[node_id] else _RETRY_S)
        except TaskFailedError:
            self._due[node_id] = now + _RETRY_S  # the node's trouble, not the storage's

    def _ask(self, node_id: str, now: float) -> None:
        assert self._root is not None
        try:
            self._nonce = self._nonce or write_nonce(self._root)
        except StorageError as error:
            _LOG.warning("the job storage cannot be written: %s", error)
            self._due[node_id] = now + _RETRY_S
            return
        self._running[node_id] = on_node(node_id, nonce_matches, self._root, *self._nonce)
