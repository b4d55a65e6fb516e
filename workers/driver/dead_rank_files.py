"""Fetches files of dead ranks from their nodes, and removes a job's files.

Owns: the tasks that do it and their timeouts. Best effort and concurrent with the
recovery, since a node may be lost. Must not know: what follows a death.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers.data_tasks import delete_job_folder, read_dead_rank_files
from workers.decisions.faults import exclusions, gpu_errors
from workers.decisions.faults.exclusions import BadNode
from workers.decisions.journal_entry import DeadRank
from workers.decisions.placement import RankPlace
from workers.driver.commit import source_of
from workers.driver.logs import JobLogs
from workers.driver.records.outbox import Outbox
from workers.driver.relay import to_record
from workers.rank.log_file import log_path
from workers.rank.spool import report_path
from workers.ray.nodes import job_folder, read_nodes
from workers.ray.tasks import on_node, result_or_none

_FETCH_S = 20.0
_LOG_BYTES = 1 << 20
_NO_REPORTS = 1 << 62
"""A cursor beyond every report: only rank 0's reports are relayed."""


class DeadRankFiles:
    """The files of one job's ranks on their nodes."""

    def __init__(self, outbox: Outbox, logs: JobLogs) -> None:
        self._outbox = outbox
        self._logs = logs
        self._threads: list[threading.Thread] = []
        self._fetched: set[tuple[int, int]] = set()
        self._sweeps: list[Any] = []
        self._bad_nodes: deque[BadNode] = deque()

    def collect(self, dead: Iterable[DeadRank]) -> None:
        """Starts fetching reports (of rank 0) and the ends of logs, of each rank once.

        To be called once the replacements run, because starting a task process would
        delay them.
        """
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for rank in dead:
            key = (rank.attempt, rank.place.rank)
            if key in self._fetched:
                continue
            self._fetched.add(key)
            # One thread per rank, because nodes may answer slowly or never while the
            # recovery continues.
            thread = threading.Thread(
                target=self._fetch,
                args=(rank.attempt, rank.place),
                name=f"salvage-{rank.place.rank}",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)

    def take_bad_nodes(self) -> list[BadNode]:
        """Returns nodes whose kernel reported a defective GPU, once."""
        taken = []
        while self._bad_nodes:
            taken.append(self._bad_nodes.popleft())
        return taken

    def finish(self, dead: Iterable[DeadRank]) -> None:
        """Waits until all files of dead ranks are fetched or have failed to be."""
        self.collect(dead)
        for thread in self._threads:
            thread.join(_FETCH_S)

    def start_sweep(self, job_id: str, nodes: Iterable[str]) -> None:
        """Starts removing the job's folder on the nodes that are alive."""
        job_nodes = set(nodes)
        self._sweeps = []
        for node in read_nodes():
            node_id = node.node_id
            if node.alive and node_id in job_nodes:
                folder = str(job_folder(node_id, job_id))
                self._sweeps.append(on_node(node_id, delete_job_folder, folder))

    def await_sweep(self, timeout_s: float) -> None:
        """Waits until the folders are removed, at most `timeout_s` for all."""
        deadline = time.monotonic() + timeout_s
        for call in self._sweeps:
            result_or_none(call, max(0.0, deadline - time.monotonic()))

    def _fetch(self, attempt: int, place: RankPlace) -> None:
        folder = Path(place.local_dir)
        source = source_of(attempt)
        log_offset = self._logs.size(attempt, place.rank)
        # The log continues at the last received byte; only reports that are neither
        # stored nor pending are fetched.
        cursor = _NO_REPORTS
        if place.rank == 0:
            cursor = self._outbox.last(source)
        call = on_node(
            place.node_id,
            read_dead_rank_files,
            str(report_path(folder, attempt, place.rank)),
            cursor,
            str(log_path(folder, attempt, place.rank)),
            log_offset,
            _LOG_BYTES,
        )
        files = result_or_none(call, _FETCH_S)
        # The node and its files may be lost together with the rank.
        if files is None:
            return
        if place.rank == 0:
            self._outbox.relay(source, [to_record(line) for line in files.reports])
        self._logs.write(attempt, place.rank, log_offset, files.log)
        defects = gpu_errors.kernel_defects(files.kernel_lines)
        if defects:
            self._bad_nodes.append(exclusions.node_of_defects(place, defects))
