"""Every refusal of data that cannot be prepared: field, code and message."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.data.indexed import (
    IndexedDatasetBuilder,
    read_index,
    write_index,
)
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.tokenizer import Tokenizer
from tests.support.corpus_files import (
    TEXTS,
    assert_refused,
    config,
    write,
    write_prepared,
)


def test_a_broken_line_is_named_while_the_tokenizer_is_trained(
    tmp_path: Path, corpus: Path
) -> None:
    broken = write(tmp_path / "broken.jsonl", ["fine"])
    broken.write_text(broken.read_text() + "{broken\n")
    data = config(corpus, broken, tokenizer=TokenizerConfig(vocab_size=300))
    assert_refused(
        data,
        tmp_path / "cache",
        "/data/train/1/path",
        "bad_line",
        "broken.jsonl:2 is not JSON",
    )


def test_too_little_text(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", ["abc", "defg"])
    cache = tmp_path / "cache"
    without = config(short, validation_fraction=0)
    assert_refused(
        without,
        cache,
        "/data/train/0/path",
        "too_short",
        r"has 9 train tokens, but one sample needs seq_length \+ 1 = 17",
        16,
    )
    message = (
        r"held-out documents have [45] tokens, .* = 5; raise validation_fraction, .*set 0 to "
        r"evaluate nothing"
    )
    only_four = write(tmp_path / "four.jsonl", ["a" * 3, "a" * 3 + "b", "a" * 20])
    assert (
        prepare(config(short, validation_fraction=0), str(cache), seq_length=8)
        .train[0]
        .num_tokens
        == 9
    )
    with pytest.raises(UnusableDataError):
        prepare(config(only_four), str(cache), seq_length=20)
    docs = write(tmp_path / "docs.jsonl", [f"{number:03}" for number in range(30)])
    assert_refused(
        config(docs, validation_fraction=0.01),
        cache,
        "/data/validation_fraction",
        "too_short",
        message,
        4,
    )
    named = config(docs, validation=(DataSource(path=str(short)),))
    assert_refused(
        named,
        cache,
        "/data/validation/0/path",
        "too_short",
        "short.jsonl has 9 validation tokens",
        16,
    )


def test_empty_sources(tmp_path: Path) -> None:
    assert_refused(
        config(write(tmp_path / "a.jsonl", ["", ""])),
        tmp_path / "c",
        "/data/train/0/path",
        "empty",
        "a.jsonl holds no text",
    )
    write_prepared(tmp_path / "none", [])
    assert_refused(
        config(tmp_path / "none"),
        tmp_path / "c",
        "/data/train/0/path",
        "empty",
        "none holds no tokens",
    )


def test_missing_sources_are_all_named_at_once(tmp_path: Path) -> None:
    data = config(
        tmp_path / "a", tmp_path / "b", validation=(DataSource(path=str(tmp_path / "c")),)
    )
    with pytest.raises(UnusableDataError) as caught:
        prepare(data, str(tmp_path / "cache"), seq_length=8)
    assert [problem.pointer for problem in caught.value.problems] == [
        "/data/train/0/path",
        "/data/train/1/path",
        "/data/validation/0/path",
    ]
    assert not (tmp_path / "cache").exists()


def test_prepared_data_that_do_not_fit(tmp_path: Path) -> None:
    prefix = write_prepared(tmp_path / "ready", [[[1, 300, 2]]])
    message = (
        "holds token 300, but the tokenizer has 257 tokens; give the tokenizer the data were "
        "made with"
    )
    assert_refused(
        config(prefix), tmp_path / "c", "/data/train/0/path", "vocab_mismatch", message
    )
    trained = config(prefix, tokenizer=TokenizerConfig())
    assert_refused(
        trained,
        tmp_path / "c",
        "/data/tokenizer/kind",
        "tokenizer_needed",
        "/data/train/0/path is already tokenized",
    )
    (tmp_path / "ready.idx").write_bytes(b"nonsense")
    assert_refused(
        config(prefix),
        tmp_path / "c",
        "/data/train/0/path",
        "bad_corpus",
        "is not a Megatron index: .*; prepare the data again",
    )
    with IndexedDatasetBuilder(tmp_path / "signed", np.dtype(np.int32)) as builder:
        builder.add([-1, 2])
        builder.end_document()
    assert_refused(
        config(tmp_path / "signed"),
        tmp_path / "c",
        "/data/train/0/path",
        "vocab_mismatch",
        "holds token -1",
    )
    header = bytearray((tmp_path / "signed.idx").read_bytes())
    header[17] = 7
    (tmp_path / "signed.idx").write_bytes(header)
    assert_refused(
        config(tmp_path / "signed"),
        tmp_path / "c",
        "/data/train/0/path",
        "bad_corpus",
        "holds float32 values, not tokens",
    )


@pytest.mark.parametrize("marks", [[], [0], [0, 2], [1, 3], [0, 2, 1, 3]])
def test_marks_of_documents_that_are_not_those_of_the_tokens(
    tmp_path: Path, marks: list[int]
) -> None:
    prefix = write_prepared(tmp_path / "ready", [[[n, 1, 2]] for n in range(3)])
    path = prefix.with_suffix(".idx")
    table = read_index(path.read_bytes(), path.name)
    write_index(path, replace(table, documents=np.array(marks, np.int64)))
    assert_refused(
        config(prefix),
        tmp_path / "c",
        "/data/train/0/path",
        "bad_corpus",
        "the documents that the index of .*/ready marks are not its 3 sequences; prepare",
        4,
    )


def test_tokenizer_files(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "tokenizer.json"

    def with_tokenizer(end: str | None = None) -> DataConfig:
        return config(
            corpus,
            tokenizer=TokenizerConfig(kind="file", path=str(path), end_of_document=end),
        )

    cache = tmp_path / "cache"
    assert_refused(
        with_tokenizer(),
        cache,
        "/data/tokenizer/path",
        "not_found",
        "tokenizer.json does not exist where the job runs",
    )
    path.write_text("{]")
    assert_refused(
        with_tokenizer(),
        cache,
        "/data/tokenizer/path",
        "bad_tokenizer",
        "not a Hugging Face tokenizer.json",
    )
    path.write_bytes(b"\xff\xfe")
    assert_refused(
        with_tokenizer(),
        cache,
        "/data/tokenizer/path",
        "unreadable",
        "cannot be read: .*give the path of a tokenizer.json",
    )
    Tokenizer.train_bpe(TEXTS, 300).save(path)
    assert_refused(
        with_tokenizer("stop"),
        cache,
        "/data/tokenizer/end_of_document",
        "no_end_token",
        "has no token 'stop'",
    )
    prepared = prepare(with_tokenizer(), str(cache), seq_length=8)
    assert Path(prepared.tokenizer_path).is_relative_to(cache)
    other = prepare(with_tokenizer("l"), str(cache), seq_length=8)
    assert other.end_of_document != prepared.end_of_document
    assert other.train[0].prefix != prepared.train[0].prefix


def test_a_cache_that_cannot_be_written(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = tmp_path / "file" / "cache"
    assert_refused(
        config(corpus),
        cache,
        "/storage/path",
        "not_writable",
        "prepared data cannot be kept in .*file/cache: .*give a folder",
    )
    assert_refused(
        config(corpus, cache=str(cache)),
        cache,
        "/data/cache",
        "not_writable",
        "cannot be kept",
    )
    assert_refused(
        config(corpus),
        "nowhere://x",
        "/storage/path",
        "not_writable",
        "cannot be kept in nowhere://x",
    )
    assert_refused(
        config(corpus),
        "file://",
        "/storage/path",
        "not_writable",
        "the path is empty or holds a NUL character",
    )
