"""Reads the jobs' storage in threads of its own, each read with a deadline.

Owns: how many reads run at once, and for how long a request waits. Used on the event loop
only. Must not know: HTTP, what is read.

A storage that accepts a connection and never answers keeps a thread for minutes, which
nothing can end. So such threads are few, they are not those that serve requests, and one
storage cannot occupy them all.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from service.exceptions import StorageUnavailableError

Result = TypeVar("Result")
MAX_LOCAL_READS = 8
MAX_BUCKET_READS = 2
"""Reads of one bucket at once."""
MAX_REMOTE_READS = 8
"""Reads of all buckets at once."""
_LOCAL = "file"


class StorageReads:
    """The reads that are running, by storage."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._remote = asyncio.Semaphore(MAX_REMOTE_READS)
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._late: set[asyncio.Future[Any]] = set()

    @property
    def is_late(self) -> bool:
        """Whether a read has been running for longer than requests wait."""
        return bool(self._late)

    async def run(self, uri: str, read: Callable[[], Result]) -> Result:
        """Returns the result of `read`, which runs in a thread, or raises its error.

        `uri` is the folder or URI that it reads from. Raises StorageUnavailableError when
        it has not ended in time, or could not even start.
        """
        storage = storage_of(uri)
        try:
            async with asyncio.timeout(self._timeout_s):
                ended = await self._start(storage, read)
                # Shielded: a request that stops waiting does not end the read.
                return await asyncio.shield(ended)
        except TimeoutError as error:
            raise StorageUnavailableError(
                f"the job's storage has not answered within {self._timeout_s:g} s; check that "
                "the service can reach it, and try again"
            ) from error

    async def _start(
        self, storage: str, read: Callable[[], Result]
    ) -> "asyncio.Future[Result]":
        slots = await self._take_slots(storage)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Result] = loop.create_future()
        late = loop.call_later(self._timeout_s, self._late.add, ended)

        def finish(_: "asyncio.Future[Result]") -> None:
            # Looked at here, because a request that has given up will not.
            ended.exception()
            late.cancel()
            self._late.discard(ended)
            for slot in slots:
                slot.release()

        ended.add_done_callback(finish)
        # A daemon: the service must be able to exit while a read hangs.
        work = partial(_run, read, ended, loop)
        threading.Thread(target=work, name="storage", daemon=True).start()
        return ended

    async def _take_slots(self, storage: str) -> list[asyncio.Semaphore]:
        slots = []
        max_reads = MAX_BUCKET_READS
        if storage == _LOCAL:
            max_reads = MAX_LOCAL_READS
        own = self._slots.setdefault(storage, asyncio.Semaphore(max_reads))
        # That of the bucket first, so that its waiting reads occupy no place of others.
        await own.acquire()
        slots.append(own)
        if storage != _LOCAL:
            try:
                await self._remote.acquire()
            except asyncio.CancelledError:
                own.release()
                raise
            slots.append(self._remote)
        return slots


def storage_of(uri: str) -> str:
    """Returns the name of the storage of a folder or URI: `file`, or that of a bucket."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == _LOCAL:
        return _LOCAL
    return f"{scheme}://{rest.partition('/')[0]}"


def _run(
    read: Callable[[], Result],
    ended: "asyncio.Future[Result]",
    loop: asyncio.AbstractEventLoop,
) -> None:
    try:
        settle = partial(ended.set_result, read())
    except Exception as error:  # noqa: BLE001 - raised again by the request that waits
        settle = partial(ended.set_exception, error)
    # The service may have ended while the read was hanging.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
