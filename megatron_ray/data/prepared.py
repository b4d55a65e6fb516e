"""Defines the manifest of prepared data.

Owns: the interface between preparation and training. Must not know: how data are
prepared.
"""

from megatron_ray.config.base import Config


class PreparedCorpus(Config):
    """A corpus as Megatron's .bin/.idx pair."""

    prefix: str
    """Path or URI without the .bin/.idx suffix."""
    weight: float
    """Weight in the blend."""
    num_tokens: int
    """Tokens in the .bin file, end-of-document tokens included."""
    num_documents: int
    """Number of documents."""
    name: str = ""
    """Name of the source in reports and metrics; empty in earlier manifests."""


class PreparedData(Config):
    """The description of prepared data from which ranks read samples; passed as JSON."""

    train: tuple[PreparedCorpus, ...]
    """Corpora to train on."""
    validation: tuple[PreparedCorpus, ...]
    """Corpora to evaluate on; may be empty."""
    tokenizer_path: str
    """tokenizer.json that turns the tokens back into text."""
    vocab_size: int
    """Size of the tokenizer's vocabulary."""
    end_of_document: int
    """Token id that ends a document."""
    begin_of_document: int | None = None
    """Token id that begins a document, if any."""
    rows_needed: int | None = None
    """Smallest vocabulary of a model for these tokens, which may be below `vocab_size`:
    special tokens that no document contains need no row. None: vocab_size."""
    unigram_nats: float | None = None
    """Cross entropy, nats per token, of the validation tokens under their own unigram
    frequencies: the baseline to beat."""
    notes: tuple[str, ...] = ()
    """What differs from what the config asked for, one sentence each."""
    first_document: str = ""
    """Beginning of the first training document as it was tokenized, for people to
    read."""

    @property
    def rows(self) -> int:
        """Smallest vocabulary of a model for these tokens."""
        return self.rows_needed or self.vocab_size

    @property
    def num_train_tokens(self) -> int:
        """Tokens of all corpora to train on."""
        return sum(corpus.num_tokens for corpus in self.train)

    @property
    def train_sizes(self) -> list[tuple[int, int]]:
        """Tokens and documents of each corpus to train on."""
        return [(corpus.num_tokens, corpus.num_documents) for corpus in self.train]
