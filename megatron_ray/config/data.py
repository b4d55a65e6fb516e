"""What is trained on.

Owns: sources, tokenizer, split. Must not know: how samples are cut.
"""

from typing import Literal

from pydantic import Field, model_validator

from megatron_ray.config.base import Config


class DataSource(Config):
    """One corpus of a blend."""

    path: str = Field(min_length=1, max_length=4096)
    """`builtin://python-stdlib`, or a path or URI of .txt, .jsonl, .parquet, a folder
    of them, or a prepared .bin/.idx prefix."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this corpus in the blend; weights need not add up to one."""
    text_key: str = Field(default="text", min_length=1)
    """Field (jsonl) or column (parquet) that holds the text."""


class TokenizerConfig(Config):
    """Text to tokens."""

    kind: Literal["bpe", "file", "bytes"] = "bpe"
    """`bpe` trains a byte-level BPE on the corpus, `file` reads a tokenizer.json,
    `bytes` is 256 bytes and an end mark."""
    vocab_size: int = Field(default=4096, ge=257, le=1 << 22)
    """Size to train to, for `bpe`; ignored otherwise."""
    path: str | None = Field(default=None, max_length=4096)
    """Path or URI of a Hugging Face tokenizer.json, for `file`."""
    end_of_document: str | None = None
    """Token that ends a document, for `file`; guessed from the usual names when not
    given."""

    @model_validator(mode="after")
    def _file_needs_path(self) -> "TokenizerConfig":
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(
                "data.tokenizer.path is needed for kind `file`, and only there"
            )
        return self


class DataConfig(Config):
    """Sources, tokenizer and split."""

    train: tuple[DataSource, ...] = Field(min_length=1, max_length=1024)
    """Corpora to train on."""
    validation: tuple[DataSource, ...] = ()
    """Corpora to evaluate on; empty: documents of `train` are held out."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training documents held out when `validation` is empty; 0 evaluates
    nothing."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Text to tokens."""
    separate_documents: bool = False
    """Documents that share a sample do not see each other: attention and positions
    begin anew in each, and none is asked to predict the next one's first token
    (Megatron's reset_attention_mask, reset_position_ids and eod_mask_loss together)."""
    cache: str | None = Field(default=None, max_length=4096)
    """Folder for prepared .bin/.idx and indices, shared by jobs; <storage>/data when
    not given."""
