"""Stores and reads the losses over held-out samples.

Owns: the rows of evaluations. Must not know: HTTP, jobs' states.

There is one row per (job, split, step, attempt). After a resume evaluations repeat, as
steps do: readers are shown the highest attempt of each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from service.store.database import Store
from service.store.metrics import Finite
from service.store.schema import EvaluationRow, JobRow

VALIDATION = "validation"


class Evaluation(BaseModel):
    """An EvalReport as a driver sends it; fields of a newer driver are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    step: int = Field(ge=0, lt=1 << 62)
    split: str = Field(max_length=64)
    loss: Finite = None
    num_tokens: int | None = None
    source_losses: dict[str, Finite] = Field(default_factory=dict)
    """Empty from an older driver."""

    def sentence(self) -> str:
        """Returns the losses as a line of the history."""
        message = f"{self.split} loss at step {self.step}: {_loss(self.loss)}"
        # A single source has the loss of the blend.
        if len(self.source_losses) > 1:
            parts = []
            for name, source_loss in self.source_losses.items():
                parts.append(f"{name} {_loss(source_loss)}")
            message += f" ({', '.join(parts)})"
        return message


@dataclass(frozen=True)
class EvaluatedStep:
    """The losses of a split after one step."""

    step: int
    attempt: int
    loss: float | None
    source_losses: Mapping[str, float | None]


def parse_evaluation(data: Mapping[str, Any]) -> Evaluation:
    """Reads an EvalReport as a driver sends it.

    Raises pydantic's ValidationError when step or split is missing or a value has a wrong
    type.
    """
    return Evaluation.model_validate(data)


def insert(
    store: Store, session: Session, job: JobRow, attempt: int, evaluation: Evaluation
) -> None:
    """Stores an evaluation, unless it is stored already."""
    table = EvaluationRow.__table__
    assert isinstance(table, sa.Table)
    values = {"job": job.number, "attempt": attempt, **evaluation.model_dump()}
    store.insert_or_ignore(session, table, [values])


def read(
    session: Session,
    job: JobRow,
    *,
    from_step: int = 0,
    attempt: int | None = None,
    limit: int | None = None,
) -> list[EvaluatedStep]:
    """Returns the evaluations of the validation split in order of step."""
    statement = (
        sa.select(EvaluationRow)
        .where(
            EvaluationRow.job == job.number,
            EvaluationRow.split == VALIDATION,
            EvaluationRow.step >= from_step,
        )
        .order_by(EvaluationRow.step, EvaluationRow.attempt)
    )
    if attempt is not None:
        statement = statement.where(EvaluationRow.attempt == attempt)
    # Evaluations are few, so the highest attempt is chosen here: it is the last of a step.
    newest: dict[int, EvaluatedStep] = {}
    for row in session.scalars(statement):
        newest[row.step] = EvaluatedStep(row.step, row.attempt, row.loss, row.source_losses)
    return list(newest.values())[:limit]


def _loss(loss: float | None) -> str:
    if loss is None:
        return "not finite"
    return f"{loss:.4f}"
