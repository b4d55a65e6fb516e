"""Watches which nodes of the cluster are being drained.

Owns: a thread that asks Ray's head. Must not know: jobs, what follows a drain.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping

from ray.exceptions import RayError

from workers.ray.nodes import drain_deadlines

_PERIOD_S = 2.0


class DrainWatch:
    """The drains as Ray last reported them.

    In a thread of its own, because Ray's head may not answer for minutes and ranks must be
    polled meanwhile.
    """

    def __init__(
        self, read: Callable[[], Mapping[str, float | None]] = drain_deadlines
    ) -> None:
        self._read = read
        self._deadlines: dict[str, float | None] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="drains", daemon=True).start()

    @property
    def deadlines(self) -> Mapping[str, float | None]:
        """When each draining node goes, by node id.

        In seconds of this process's monotonic clock; None: not known.
        """
        return self._deadlines

    def close(self) -> None:
        """Ends the thread without waiting for it."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            # While the head is away, what it reported last stays true.
            with contextlib.suppress(RayError, OSError, RuntimeError, ValueError):
                self._update(self._read())
            self._closed.wait(_PERIOD_S)

    def _update(self, deadlines: Mapping[str, float | None]) -> None:
        # Converted once, so that changes of the wall clock do not move a deadline.
        wall_to_monotonic = time.monotonic() - time.time()
        known = self._deadlines
        updated: dict[str, float | None] = {}
        for node_id, deadline in deadlines.items():
            updated[node_id] = known.get(node_id)
            if updated[node_id] is None and deadline is not None:
                updated[node_id] = deadline + wall_to_monotonic
        self._deadlines = updated
