"""Corpora, configs and checks that tests of preparation share, and a corpus for those of
training.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedCorpus, PreparedData
from megatron_ray.data.tokenizer import Tokenizer

BYTES = TokenizerConfig(kind="bytes")
TEXTS = [
    f"document {number}: " + "lorem ipsum dolor " * (number % 5) for number in range(60)
]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(*paths: Path | str, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"tokenizer": BYTES, "validation_fraction": 0.1, **changes}
    return DataConfig(train=tuple(DataSource(path=str(path)) for path in paths), **values)


def prepare_squares(data: DataConfig) -> PreparedData:
    """Writes short lines to the only source, and prepares them for samples of 32 tokens."""
    (source,) = data.train
    lines = [f"line {number}: {number * number} is a square" for number in range(400)]
    Path(source.path).write_text("\n".join(lines))
    assert data.cache is not None
    return prepare(data, data.cache, seq_length=32)


def texts_of(corpus: PreparedCorpus, tokenizer: Tokenizer) -> list[str]:
    tokens = IndexedDataset(corpus.prefix)
    texts = []
    for sequence in range(len(tokens)):
        ids = tokens[sequence].tolist()
        assert ids.pop() == tokenizer.end_of_document
        texts.append(tokenizer.decode(ids))
    return texts


def assert_refused(
    data: DataConfig,
    cache: Path | str,
    pointer: str,
    code: str,
    message: str,
    seq_length: int = 8,
) -> None:
    with pytest.raises(UnusableDataError, match=message) as caught:
        prepare(data, str(cache), seq_length=seq_length)
    assert (pointer, code) in [
        (problem.pointer, problem.code) for problem in caught.value.problems
    ]


def write_prepared(prefix: Path, documents: list[list[list[int]]]) -> Path:
    with IndexedDatasetBuilder(prefix, np.dtype(np.uint16)) as builder:
        for document in documents:
            for sequence in document:
                builder.add(sequence)
                builder.end_sequence()
            builder.end_document()
    return prefix
