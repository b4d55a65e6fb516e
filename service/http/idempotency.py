"""Requests that may be sent twice.

Owns: what an Idempotency-Key was answered. Must not know: what the requests do.

The answer is stored in the transaction that does the work, so either both are there or
neither, and of two requests at once the second finds the first one's answer.
"""

import asyncio
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.http.errors import ProblemError
from service.store.database import Store
from service.store.schema import IdempotencyRow

LONGEST_KEY = 255
KEPT_S = 7 * 86400
FORGET_EVERY_S = 3600.0
logger = logging.getLogger("service")


@dataclass(frozen=True)
class IdempotentRequest:
    """One request with its key; without a key nothing is remembered."""

    key: str | None
    scope: str
    """Who sent it, and to which address."""
    body_sha256: str

    @classmethod
    def of(cls, key: str | None, caller: str, path: str, body: Any) -> "IdempotentRequest":
        """Raises ProblemError request_invalid for a key that is empty or too long."""
        if key is not None and not 1 <= len(key) <= LONGEST_KEY:
            raise ProblemError(
                "request_invalid",
                f"an Idempotency-Key has 1 to {LONGEST_KEY} characters, not {len(key)}; a "
                "UUID is a good one",
            )
        text = json.dumps(body, sort_keys=True)
        return cls(key, f"{caller} {path}", hashlib.sha256(text.encode()).hexdigest())

    def earlier(self, session: Session) -> tuple[int, dict[str, Any]] | None:
        """Status and body of the first answer.

        Raises ProblemError when the key came with another body.
        """
        row = (
            None
            if self.key is None
            else session.get(IdempotencyRow, (self.scope, self.key))
        )
        if row is None:
            return None
        if row.body_sha256 != self.body_sha256:
            text = (
                "this Idempotency-Key was used with another body; repeat the first body, or "
                "send the new one with a new key"
            )
            raise ProblemError("idempotency_key_reused", text)
        return row.status, row.body

    def remember(self, session: Session, status: int, body: dict[str, Any]) -> None:
        """Stores the answer."""
        if self.key is not None:
            row = IdempotencyRow(
                scope=self.scope,
                key=self.key,
                body_sha256=self.body_sha256,
                status=status,
                body=body,
            )
            row.created_at = time.time()
            session.add(row)
            session.flush()


def forget_old(store: Store) -> None:
    """Drops answers that nobody will ask for again."""
    with store.write() as session:
        session.execute(
            sa.delete(IdempotencyRow).where(
                IdempotencyRow.created_at < time.time() - KEPT_S
            )
        )


async def forget_regularly(store: Store) -> None:
    """The same now and then, until cancelled: a service may live for months."""
    while True:
        await asyncio.sleep(FORGET_EVERY_S)
        try:
            await run_in_threadpool(forget_old, store)
        except sa.exc.SQLAlchemyError:
            logger.warning(
                "old answers could not be dropped; trying again in %.0f s",
                FORGET_EVERY_S,
                exc_info=True,
            )
