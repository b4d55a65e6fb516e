"""Remembered answers: those that will not be asked for again are dropped, while the
service runs too.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from service.http import idempotency
from service.settings import Settings
from service.store.schema import IdempotencyRow


def test_old_answers_are_dropped_while_the_service_runs(
    settings: Settings, start: Callable[[Settings], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "DELETE_EVERY_S", 0.05)
    service = start(settings)
    first = service.submit(**{"Idempotency-Key": "old"})
    service.submit(**{"Idempotency-Key": "new"})
    store = service.app.state.context.store
    with store.write() as session:
        old = IdempotencyRow.key == "old"
        session.execute(
            sa.update(IdempotencyRow)
            .where(old)
            .values(created_at=time.time() - idempotency.KEPT_S - 60)
        )
    deadline = time.monotonic() + 20
    while True:
        with store.read() as session:
            keys = set(session.scalars(sa.select(IdempotencyRow.key)))
        if keys == {"new"}:
            break
        assert time.monotonic() < deadline, f"still there after 20 s: {keys}"
        time.sleep(0.02)
    assert service.submit(**{"Idempotency-Key": "old"})["id"] != first["id"]
