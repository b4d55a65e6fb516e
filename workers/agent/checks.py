"""Runs checks that only the cluster can make.

Owns: when checks of a spec's paths and of each node's storage run, and where their
results are sent. Must not know: what a check examines.
"""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from megatron_ray.storage.errors import StorageError
from workers.agent.check_tasks import check_task, nonce_matches, write_nonce
from workers.decisions.cluster_growth import group_of
from workers.protocol.wire import CheckRequest, CheckResult, NodeInfo
from workers.ray.tasks import TaskFailedError, anywhere, is_done, on_node, result
from workers.service_client import (
    ServiceClient,
    ServiceRefusedError,
    ServiceUnavailableError,
)

_LOG = logging.getLogger("megatron_ray.agent")
_REPEAT_S = 300.0
_RETRY_S = 10.0
_MAX_REMEMBERED = 1000


class CheckRunner:
    """Runs each requested check once, as a CPU task, and sends its result when done."""

    def __init__(self, client: ServiceClient) -> None:
        self._client = client
        self._seen: dict[str, None] = {}
        self._running: dict[str, Any] = {}

    @property
    def has_running(self) -> bool:
        """Whether a check is running."""
        return bool(self._running)

    def start(self, requests: Iterable[CheckRequest]) -> None:
        """Starts the checks that have not been started before."""
        # The service repeats a request in each reply until it has the result.
        for request in requests:
            if request.check_id not in self._seen:
                self._seen[request.check_id] = None
                resumed = None
                if request.resumed is not None:
                    resumed = request.resumed.model_dump()
                self._running[request.check_id] = anywhere(
                    check_task,
                    request.spec,
                    request.storage_path,
                    request.path_rules,
                    resumed,
                )
        # A dict keeps insertion order: the oldest are forgotten first.
        while len(self._seen) > _MAX_REMEMBERED:
            self._seen.pop(next(iter(self._seen)))

    def send_results(self) -> None:
        """Sends the results of checks that are done.

        A result that cannot be sent is dropped: the check then times out in the
        service.
        """
        for check_id, call in list(self._running.items()):
            if not is_done(call):
                continue
            del self._running[check_id]
            fields = _result_fields(call)
            try:
                self._client.check_result(CheckResult(check_id=check_id, **fields))
            except (ServiceUnavailableError, ServiceRefusedError) as error:
                _LOG.warning("%s", error)


def _result_fields(call: Any) -> dict[str, Any]:
    """Returns a check's problems and notes; a failed check is itself a problem."""
    try:
        fields: dict[str, Any] = result(call)
    except TaskFailedError as error:
        detail = f"the paths could not be checked on the cluster: {error}"
        row = {"pointer": "", "code": "check_failed", "detail": detail}
        return {"problems": [row]}
    return fields


class StorageChecks:
    """Checks whether each node reads a nonce that this process wrote to the storage.

    Nodes of `node_groups` are checked until they can, and then never again: a repeated
    check would count as work, and an autoscaler removes idle nodes only.
    """

    def __init__(self, root: str | None, node_groups: Collection[str] = ()) -> None:
        self._root = root
        self._node_groups = frozenset(node_groups)
        self._nonce: tuple[str, str] | None = None
        self._results: dict[str, bool] = {}
        self._due: dict[str, float] = {}
        self._running: dict[str, Any] = {}

    def results(self) -> Mapping[str, bool]:
        """Returns the latest result of each node that has one, by node id."""
        return self._results

    def update(self, nodes: Sequence[NodeInfo]) -> None:
        """Collects results and starts the checks that are due; never waits."""
        if self._root is None:
            return
        now = time.monotonic()
        for node_id, call in list(self._running.items()):
            if is_done(call):
                del self._running[node_id]
                self._collect(node_id, call, now)
        # At most one check per node at a time, so that tasks cannot pile up on a node
        # that hangs.
        for node in nodes:
            is_running = node.node_id in self._running
            is_due = now >= self._due.get(node.node_id, 0.0)
            is_settled = group_of(node) in self._node_groups and self._results.get(
                node.node_id, False
            )
            if node.alive and is_due and not is_running and not is_settled:
                self._start(self._root, node.node_id, now)

    def _collect(self, node_id: str, call: Any, now: float) -> None:
        self._due[node_id] = now + _RETRY_S
        try:
            self._results[node_id] = bool(result(call))
        except TaskFailedError:
            # The node failed, not the storage: the previous result stays valid.
            return
        if self._results[node_id]:
            self._due[node_id] = now + _REPEAT_S

    def _start(self, root: str, node_id: str, now: float) -> None:
        try:
            # Written once: every node and every later check reads the same nonce.
            self._nonce = self._nonce or write_nonce(root)
        except StorageError as error:
            _LOG.warning("cannot write to the job storage: %s", error)
            self._due[node_id] = now + _RETRY_S
            return
        name, nonce = self._nonce
        self._running[node_id] = on_node(node_id, nonce_matches, root, name, nonce)
