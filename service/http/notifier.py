"""Who waits for what.

Owns: wake-ups between threads that commit and coroutines that wait. Must not know: the
database's content.

A waiter takes a ticket first and reads the database second, so a commit in between is
never missed.
"""

import asyncio
import contextlib
from collections.abc import Iterator


class Notifier:
    """Topics are plain strings, such as `job/<id>`; a wake-up carries no data, the
    waiter reads again.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """True once the service is on its way out: waiters should answer with what they
        have.
        """
        return self._closed

    def attach(self) -> None:
        """Binds to the running loop; called once at start-up."""
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @contextlib.contextmanager
    def ticket(self, *topics: str) -> Iterator["Subscription"]:
        """A place in the queue of each topic, given up at the end of the block."""
        event = asyncio.Event()
        for topic in topics:
            self._waiting.setdefault(topic, set()).add(event)
        try:
            yield Subscription(event, self)
        finally:
            for topic in topics:
                waiting = self._waiting[topic]
                waiting.discard(event)
                if not waiting:
                    del self._waiting[topic]

    def notify(self, *topics: str) -> None:
        """Wakes the topics' waiters; callable from any thread, after the commit."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, topics)

    def close(self) -> None:
        """Wakes everybody for good; called on the loop's thread."""
        self._closed = True
        self._wake(tuple(self._waiting))

    def _wake(self, topics: tuple[str, ...]) -> None:
        for topic in topics:
            for event in self._waiting.get(topic, ()):
                event.set()


class Subscription:
    """One waiter's place."""

    def __init__(self, event: asyncio.Event, hub: Notifier) -> None:
        self._event = event
        self._hub = hub

    async def wait(self, timeout_s: float) -> bool:
        """True when woken, False when the time is over; at once when the hub is closed.

        Ready to wait again afterwards.
        """
        if self._hub.closed:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True
