"""Defines the external dependencies of a job's driver.

Owns: the list of these dependencies. `driver.open_ports` builds the real ones; tests
pass fakes, which can kill a driver between any two calls.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ray.storage.storage import Storage
from workers.driver.dead_rank_files import DeadRankFiles
from workers.driver.gauges import TrainingGauges
from workers.driver.logs import JobLogs
from workers.driver.records.outbox import Outbox
from workers.protocol.wire import NodeInfo
from workers.ray.drain_watch import DrainWatch
from workers.ray.worker_group import WorkerGroup


class TaskRunner(Protocol):
    """Runs plain functions on the cluster; `workers.ray.tasks` is the real one."""

    def anywhere(self, body: Callable[..., Any], *args: Any) -> Any:
        """Starts a function on any node and returns a reference to its result."""

    def is_done(self, call: Any) -> bool:
        """Whether the task has finished or failed."""

    def result(self, call: Any) -> Any:
        """Returns the result. Raises TaskFailedError."""

    def end(self, call: Any) -> None:
        """Ends the task's process unless it is done."""


@dataclass(frozen=True)
class JobPorts:
    """The dependencies of one incarnation of one job's driver."""

    open_storage: Callable[[str], Storage]
    """Opens the storage at a folder or URI: that of the job or of a checkpoint."""
    outbox: Outbox
    group: WorkerGroup
    tasks: TaskRunner
    read_nodes: Callable[[], tuple[NodeInfo, ...]]
    drains: DrainWatch
    unreachable_nodes: Callable[[Iterable[str]], tuple[str, ...]]
    """Returns those of some nodes that have died, however Ray lists them."""
    end_processes: Callable[[Mapping[str, Sequence[int]]], None]
    """Has processes of ranks ended, by the id of their node; does not wait."""
    dead_rank_files: DeadRankFiles
    logs: JobLogs
    gauges: TrainingGauges
    executor: Executor
    """Commits checkpoints beside the driver's thread, one at a time."""
    clock: Callable[[], float]
    """Seconds of a monotonic clock."""
    jitter: Callable[[], float]
    """A random number in [0, 1), for the back-off."""
    code_version: str

    def close(self) -> None:
        """Ends the threads without waiting for them."""
        self.outbox.close()
        self.drains.close()
        self.executor.shutdown(wait=False)
