"""Files of ranks on their nodes.

Owns: fetching what dead ranks left, removing what a job leaves. Best effort, beside the
recovery.
"""

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers.data_tasks import delete_job_folder, read_dead_rank_files
from workers.decisions.placement import RankPlace
from workers.driver.commit import source_of
from workers.driver.journal import DeadRank
from workers.driver.logs import JobLogs
from workers.driver.outbox import Outbox
from workers.driver.supervision import relayed
from workers.rank.log_file import log_path
from workers.rank.spool import report_path
from workers.ray.nodes import job_folder, read_nodes
from workers.ray.tasks import on_node, result_or_none

_SALVAGE_S = 20.0
_LOG_BYTES = 1 << 20
_NOTHING = 1 << 62


class DeadRankFiles:
    """Of one job."""

    def __init__(self, outbox: Outbox, logs: JobLogs) -> None:
        self._outbox = outbox
        self._logs = logs
        self._threads: list[threading.Thread] = []
        self._asked: set[tuple[int, int]] = set()
        self._sweeps: list[Any] = []

    def collect(self, dead: Iterable[DeadRank]) -> None:
        """Starts fetching reports (of rank 0, the only one whose steps are relayed) and
        the ends of logs; of each dead rank once.

        To be called when their successors run, since starting a process for it would
        hold those up.
        """
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for attempt, place in ((found.attempt, found.place) for found in dead):
            if (attempt, place.rank) not in self._asked:
                self._asked.add((attempt, place.rank))
                thread = threading.Thread(
                    target=self._salvage_rank,
                    args=(attempt, place),
                    name=f"salvage-{place.rank}",
                    daemon=True,
                )
                thread.start()
                self._threads.append(thread)

    def finish(self, dead: Iterable[DeadRank]) -> None:
        """Until all that the dead left is fetched, or cannot be."""
        self.collect(dead)
        for thread in self._threads:
            thread.join(_SALVAGE_S)

    def start_sweep(self, job_id: str, nodes: Iterable[str]) -> None:
        """Begins to remove the job's folder on those of the nodes that still live."""
        alive = {node.node_id for node in read_nodes() if node.alive}
        self._sweeps = [
            on_node(node, delete_job_folder, str(job_folder(node, job_id)))
            for node in nodes
            if node in alive
        ]

    def await_sweep(self, timeout_s: float) -> None:
        """Until that is done, at most so long."""
        deadline = time.monotonic() + timeout_s
        for call in self._sweeps:
            result_or_none(call, max(0.0, deadline - time.monotonic()))

    def _salvage_rank(self, attempt: int, place: RankPlace) -> None:
        folder = Path(place.local_dir)
        source = source_of(attempt)
        offset = self._logs.size(attempt, place.rank)
        reports = report_path(folder, attempt, place.rank)
        log = log_path(folder, attempt, place.rank)
        after = self._outbox.last(source) if place.rank == 0 else _NOTHING
        call = on_node(
            place.node_id,
            read_dead_rank_files,
            str(reports),
            after,
            str(log),
            offset,
            _LOG_BYTES,
        )
        found = result_or_none(call, _SALVAGE_S)
        if found is not None:
            lines, data = found
            if place.rank == 0:
                self._outbox.relay(source, [relayed(line) for line in lines])
            self._logs.write(attempt, place.rank, offset, data)
