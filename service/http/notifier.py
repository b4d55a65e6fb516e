"""Wakes coroutines that wait for a change in the database.

Owns: wake-ups from threads that commit to coroutines that wait. Must not know: what is in
the database.

A waiter subscribes first and reads the database second, so a commit in between is never
missed.
"""

import asyncio
import contextlib
from collections.abc import Iterator


class Notifier:
    """Subscriptions by topic.

    Topics are plain strings, such as `job/<id>`. A notification carries no data: the
    waiter reads the database again.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: dict[str, set[asyncio.Event]] = {}
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether the service shuts down; waiters then answer with their current data."""
        return self._is_closed

    def attach(self) -> None:
        """Binds to the running event loop; called once at start-up."""
        self._loop = asyncio.get_running_loop()
        self._is_closed = False

    @contextlib.contextmanager
    def subscribe(self, *topics: str) -> Iterator["Subscription"]:
        """Yields a subscription to the topics, which ends with the block."""
        # One event for all topics, because the waiter rereads everything.
        event = asyncio.Event()
        for topic in topics:
            self._events.setdefault(topic, set()).add(event)
        try:
            yield Subscription(event, self)
        finally:
            for topic in topics:
                self._unsubscribe(topic, event)

    def notify(self, *topics: str) -> None:
        """Wakes the topics' waiters; may be called from any thread, after the commit."""
        # Commits may occur before the start and after the end of the service.
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, topics)

    def close(self) -> None:
        """Wakes all waiters for good; called on the event loop's thread."""
        self._is_closed = True
        self._wake(tuple(self._events))

    def _unsubscribe(self, topic: str, event: asyncio.Event) -> None:
        events = self._events[topic]
        events.discard(event)
        if not events:
            # Topics name jobs: without this the dictionary would grow for ever.
            del self._events[topic]

    def _wake(self, topics: tuple[str, ...]) -> None:
        for topic in topics:
            for event in self._events.get(topic, ()):
                event.set()


class Subscription:
    """One waiter."""

    def __init__(self, event: asyncio.Event, notifier: Notifier) -> None:
        self._event = event
        self._notifier = notifier

    async def wait(self, timeout_s: float) -> bool:
        """Waits for a notification; True when woken, False when the time is over.

        Returns at once when the notifier is closed. May be called again afterwards.
        """
        if self._notifier.is_closed:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        # Cleared before the waiter reads, so that a commit during its read wakes it again.
        self._event.clear()
        return True
