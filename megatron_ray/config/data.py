"""Defines the training data: its sources, the tokenizer and the validation split.

Must not know: how documents are cut into samples.
"""

import re
from collections import Counter
from collections.abc import Container, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_ray.config.base import Config

SpecialTokens = Literal["none", "all"] | Annotated[tuple[str, ...], Field(max_length=1024)]
"""Which special tokens text may contain: none, all, or those with these names."""


class DataSource(Config):
    """One corpus of a blend."""

    path: str = Field(min_length=1, max_length=4096)
    """`builtin://python-stdlib`, `builtin://mock` (4 MiB of random words, to measure a
    cluster), or a path or URI of a .txt, .jsonl (also .json with an
    object per line), .parquet or .arrow file, of a folder or glob of such files, or of a
    prepared .bin/.idx pair (without the extension). Text and lines may be compressed: .gz,
    .zst, .bz2, .xz. In a folder or glob, files and sub-folders named as test or validation data
    (test, validation, valid, val, dev, eval) are not trained on; name them by themselves
    to do so. READMEs and licences are not read. What is left out is listed by `data
    prepare`, in plans and in the job's events."""
    weight: float = Field(default=1.0, gt=0)
    """Relative share of samples taken from this corpus. Weights are normalized over the
    blend, so they need not sum to one."""
    text_key: str = Field(default="text", min_length=1)
    """Name of the JSON field (.jsonl) or the column (.parquet, .arrow) with the text; a dotted
    path, such as `meta.text`, for one inside an object or struct. Rows without text (null,
    empty or absent) are left out and counted."""
    max_bad_records: int = Field(default=0, ge=0, le=1 << 40)
    """Bad records (lines that are no JSON object, values that are no text, text that is
    not UTF-8) that are left out and counted; more end the job before it trains. Default:
    any bad record ends it, with a message that names the first and their number."""
    name: str | None = Field(
        default=None, pattern=r"^[^\s,/]+(/[^\s,/]+)*$", max_length=200
    )
    """Name in reports and metrics, as in `val_loss/NAME`, which no other source of the
    list has. Default: the last part of the path, or as many parts as distinguish it."""


def source_names(sources: Sequence[DataSource]) -> tuple[str, ...]:
    """Returns a different name for each source: its `name`, or the end of its path."""
    parts = [_path_parts(source.path) for source in sources]
    most_parts = max((len(own) for own in parts), default=0)
    names = [source.name or own[-1] for source, own in zip(sources, parts, strict=True)]
    # Equal names get one more folder at a time, such as en/a.jsonl and de/a.jsonl.
    for num_parts in range(2, most_parts + 1):
        counts = Counter(names)
        for number, source in enumerate(sources):
            if source.name is None and counts[names[number]] > 1:
                names[number] = "/".join(parts[number][-num_parts:])
    # Equal paths get a number.
    taken = {source.name for source in sources if source.name is not None}
    for number, source in enumerate(sources):
        if source.name is None:
            names[number] = _unused(names[number], taken)
            taken.add(names[number])
    return tuple(names)


def _path_parts(path: str) -> list[str]:
    # A name is one word, and commas separate the names of metrics.
    parts = re.sub(r"[\s,]+", "_", path).split("/")
    return [part for part in parts if part] or ["source"]


def _unused(name: str, taken: Container[str]) -> str:
    numbered = name
    number = 2
    while numbered in taken:
        numbered = f"{name}-{number}"
        number += 1
    return numbered


class TokenizerConfig(Config):
    """How text is turned into tokens."""

    kind: Literal["bpe", "file", "bytes"] = "bpe"
    """`bpe` trains a byte-level BPE tokenizer on the corpus, `file` reads a Hugging Face
    tokenizer.json, `bytes` uses the 256 byte values and an end-of-document token. A run
    that begins with weights (checkpoint.start_from, or its own checkpoint) must use the
    tokenizer they were made with: `bpe` then takes theirs instead of training one, and
    another tokenizer is refused, unless it only adds tokens."""
    vocab_size: int = Field(default=4096, ge=257, le=1 << 22)
    """Tokens that a `bpe` tokenizer is trained to. Ignored for the other kinds."""
    path: str | None = Field(default=None, max_length=4096)
    """Path or URI of a tokenizer.json. Required for `file` and refused for the other
    kinds."""
    end_of_document: str | None = None
    """Token appended to every document. Default: the one that the weights the run begins
    with were made with, or else the one declared by the files beside `path`
    (`eos_token_id` of config.json, `eos_token` of tokenizer_config.json), or else the one
    that the tokenizer puts after every text, or else the first of the usual names (such
    as `<|endoftext|>`) among the tokenizer's special tokens."""
    begin_of_document: str | None = None
    """Token put before every document, and before every prompt of a model trained so
    (`<s>` of Llama 2, `<bos>` of Gemma). Empty for none. Default: the one that the
    weights the run begins with were made with, or else none."""
    special_tokens_in_text: SpecialTokens = "none"
    """Special tokens that are recognised when text contains their names, as in rendered
    chats: `none` (the names are ordinary text), `all`, or a list of names. Prompts of a
    model trained so are read alike. A `bpe` tokenizer is trained to have the tokens that
    are named here and around documents. `all` leaves out the end token, so that text cannot
    end its own document; name it to recognise it."""

    @model_validator(mode="after")
    def _file_needs_path(self) -> "TokenizerConfig":
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(
                "data.tokenizer.path is needed for kind `file`, and only there"
            )
        return self


class DataConfig(Config):
    """Corpora, tokenizer and validation split."""

    train: tuple[DataSource, ...] = Field(min_length=1, max_length=1024)
    """Corpora to train on, blended by their weights."""
    validation: tuple[DataSource, ...] = Field(default=(), max_length=1024)
    """Corpora to evaluate on. Files that folders or globs of `train` share with them are
    not trained on. Default (empty): the validation files beside the files of each source
    of `train`, or a share of its documents, see `validation_fraction`."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of each source's documents held out for validation when `validation` is
    empty and the source has no validation files; 0 disables evaluation. All copies of a
    text are on one side, and documents are chosen so that the share of tokens is near
    this one too. Where whole documents do not add up to it, the end of one is held out.
    A share that is not near this one all the same is noted when the data are
    prepared."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text is turned into tokens."""
    shuffle: bool = True
    """Whether samples are taken in a random order, which follows from training.seed.
    Without it they are taken in the order of the documents: files by path, documents as
    in their file, pass after pass; a blend takes from each of its corpora in that
    order. Validation samples are drawn at random in any case."""
    separate_documents: bool = False
    """Isolates documents that are packed into one sample: attention and positions start
    anew in each document, and the first token of a document is not a label
    (Megatron's reset_attention_mask, reset_position_ids and eod_mask_loss together).
    A document ends as in the .idx file, and after an end-of-document token that does not
    begin it."""
    cache: str | None = Field(default=None, max_length=4096)
    """Folder of prepared .bin/.idx files and sample indices, which jobs may share.
    Default: `<storage.path>/data`."""

    @field_validator("train", "validation")
    @classmethod
    def _names_differ(cls, sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        counts = Counter(source.name for source in sources if source.name is not None)
        for name, count in counts.items():
            if count > 1:
                raise ValueError(f"{count} sources have the name {name!r}; change one")
        return sources
