"""Makes requests safe to send twice: a repeated Idempotency-Key gets the first response.

Owns: the stored responses. Must not know: the work of requests.

The response is stored in the same transaction as the request's changes, so both are
committed or neither, and of two simultaneous requests the second finds the response of
the first.
"""

import asyncio
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.exceptions import RequestInvalidError
from service.http.errors import ProblemError
from service.store.database import Store
from service.store.schema import IdempotencyRow

MAX_KEY_CHARS = 255
KEPT_S = 7 * 86400
DELETE_EVERY_S = 3600.0
logger = logging.getLogger("service")


class StoredResponse(NamedTuple):
    """The response that a request got when it was sent first."""

    status: int
    body: dict[str, Any]


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that may carry a key; without one nothing is stored."""

    key: str | None
    scope: str
    """Caller and path: equal keys of different callers never meet."""
    body_sha256: str

    @classmethod
    def of(cls, key: str | None, caller: str, path: str, body: Any) -> "IdempotentRequest":
        """Returns the request of a caller; `body` is its parsed JSON.

        Raises RequestInvalidError for a key that is empty or too long.
        """
        if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
            raise RequestInvalidError(
                f"an Idempotency-Key has 1 to {MAX_KEY_CHARS} characters, not {len(key)}; use "
                "a UUID"
            )
        # Sorted keys: the same object may be serialized in another order.
        text = json.dumps(body, sort_keys=True)
        return cls(key, f"{caller} {path}", hashlib.sha256(text.encode()).hexdigest())

    def earlier_response(self, session: Session) -> StoredResponse | None:
        """Returns the response to the same request, or None for a new request.

        Raises ProblemError when the key was used with another body.
        """
        if self.key is None:
            return None
        row = session.get(IdempotencyRow, (self.scope, self.key))
        if row is None:
            return None
        # Using the same key for another request is an error.
        if row.body_sha256 != self.body_sha256:
            raise ProblemError(
                "idempotency_key_reused",
                "this Idempotency-Key was used with another body; send the first body again, "
                "or use a new key",
            )
        return StoredResponse(row.status, row.body)

    def store_response(self, session: Session, status: int, body: dict[str, Any]) -> None:
        """Stores the response, to be committed with the work of the request."""
        if self.key is None:
            return
        row = IdempotencyRow(scope=self.scope, key=self.key, body_sha256=self.body_sha256)
        row.status = status
        row.body = body
        row.created_at = time.time()
        session.add(row)
        session.flush()


def delete_old_responses(store: Store) -> None:
    """Deletes responses that are too old to be asked for again."""
    with store.write() as session:
        oldest = time.time() - KEPT_S
        session.execute(sa.delete(IdempotencyRow).where(IdempotencyRow.created_at < oldest))


async def delete_regularly(store: Store) -> None:
    """Deletes old responses until cancelled: a service may run for months."""
    while True:
        # Waits first, because old responses were deleted at the start of the service.
        await asyncio.sleep(DELETE_EVERY_S)
        try:
            await run_in_threadpool(delete_old_responses, store)
        except sa.exc.SQLAlchemyError:
            # Old responses are harmless, so a failed deletion is retried later.
            logger.warning(
                "old responses could not be deleted; trying again in %.0f s",
                DELETE_EVERY_S,
                exc_info=True,
            )
