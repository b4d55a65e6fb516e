"""Ends processes of workers that Ray's kill may not reach.

Owns: SIGKILL by pid, on the process's node. Must not know: slots, ranks, why they are ended.

Ray ends an actor's process by a call to it, and by a signal when that call is not answered in
time. When the call fails instead, as it may with a process that is stopped, Ray sends no signal:
the process stays and holds its resources.
"""

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from workers.ray.tasks import on_node

_TITLE = b"RankWorker"
"""Ray names a process after its actor's class."""


def end_processes(pids: Mapping[str, Sequence[int]]) -> None:
    """Has processes of rank workers ended, by the id of their node; does not wait."""
    for node_id, of_node in pids.items():
        on_node(node_id, end_here, list(of_node))


def end_here(pids: Sequence[int]) -> None:
    """Ends those processes of this node that still are rank workers."""
    for pid in pids:
        # It may have ended, and its number may belong to another process by now.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _TITLE in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
