"""Words the events of a driver's records.

Must not know: tables, HTTP.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from service.store.evaluations import Evaluation

_MAX_NOTES = 50
_MAX_NOTE_CHARS = 2000


class _CorpusData(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    num_tokens: int
    num_documents: int


class _ManifestData(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    train: tuple[_CorpusData, ...]
    validation: tuple[_CorpusData, ...]
    vocab_size: int


def prepared_message(manifest: dict[str, Any]) -> str:
    """Returns what the data of a job are."""
    try:
        data = _ManifestData.model_validate(manifest)
    except ValidationError:
        # A driver of another version may send other fields.
        return "data ready"
    parts = []
    for split, corpora in (("training", data.train), ("validation", data.validation)):
        num_tokens = sum(corpus.num_tokens for corpus in corpora)
        num_documents = sum(corpus.num_documents for corpus in corpora)
        documents = count(num_documents, "document")
        parts.append(f"{num_tokens:,} {split} tokens in {documents}")
    return f"data ready: {', '.join(parts)}, vocabulary {data.vocab_size:,}"


def evaluation_message(evaluation: Evaluation) -> str:
    """Returns the loss, and that of each of several sources."""
    loss = _loss(evaluation.loss)
    message = f"{evaluation.split} loss at step {evaluation.step}: {loss}"
    # A single source has the loss of the blend.
    if len(evaluation.source_losses) > 1:
        parts = []
        for name, source_loss in evaluation.source_losses.items():
            parts.append(f"{name} {_loss(source_loss)}")
        message += f" ({', '.join(parts)})"
    return message


def _loss(loss: float | None) -> str:
    if loss is None:
        return "not finite"
    return f"{loss:.4f}"


def notes(manifest: dict[str, Any]) -> list[str]:
    """Returns what the preparation reports about the data, one sentence each."""
    notes = manifest.get("notes")
    if not isinstance(notes, list | tuple):
        return []
    sentences = [str(note)[:_MAX_NOTE_CHARS] for note in notes[:_MAX_NOTES]]
    if len(notes) > _MAX_NOTES:
        sentences.append(f"and {len(notes) - _MAX_NOTES} more notes on the data")
    return sentences


def count(number: int, noun: str) -> str:
    """Returns a number with its noun, which takes an s in the plural."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"
