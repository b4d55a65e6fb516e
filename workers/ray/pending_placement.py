"""Waits for a placement group.

Owns: one request to Ray's head for a wait, however long it is. Must not know: what is
placed, what follows when it is not.
"""

from typing import Any

import ray

_LOOK_S = 1


class PendingPlacement:
    """A placement group that is requested; it may be ready by now."""

    def __init__(self, group: Any) -> None:
        """`group` is Ray's handle."""
        self.group = group
        self._ready: Any = None

    def wait(self, timeout_s: float) -> bool:
        """Waits at most that long; returns whether the group is ready.

        Raises Exception, as Ray does, when the group has been removed.
        """
        # The handle's own `wait` counts whole seconds: it returns at once for a part of
        # one. Each call that ends early also stays in the memory of Ray's head (20 KB)
        # until the group is ready, which may take days.
        if self._ready is None:
            self._ready = self.group.ready()
        done, _ = ray.wait([self._ready], timeout=timeout_s)
        if not done:
            return False
        # It may have lost a node since then, so the next wait is a new request.
        self._ready = None
        return bool(self.group.wait(_LOOK_S))
