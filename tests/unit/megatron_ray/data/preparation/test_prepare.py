"""Preparing: splits, reuse, concurrency, death in the middle, object stores, every
refusal.
"""

import json
import math
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs as arrow_fs

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.data.datasets import build_dataset
from megatron_ray.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_ray.data.preparation import prepare as prepare_module
from megatron_ray.data.preparation import sources, tokenizer_choice
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.preparation.prepare import prepare, unigram_nats
from megatron_ray.data.prepared import PreparedCorpus
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.storage import files, location

BYTES = TokenizerConfig(kind="bytes")
TEXTS = [
    f"document {number}: " + "lorem ipsum dolor " * (number % 5) for number in range(60)
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", TEXTS)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(*paths: Path | str, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"tokenizer": BYTES, "validation_fraction": 0.1, **changes}
    return DataConfig(train=tuple(DataSource(path=str(path)) for path in paths), **values)


def texts_of(corpus: PreparedCorpus, tokenizer: Tokenizer) -> list[str]:
    tokens = IndexedDataset(corpus.prefix)
    made = []
    for sequence in range(len(tokens)):
        ids = tokens[sequence].tolist()
        assert ids.pop() == tokenizer.end_of_document
        made.append(tokenizer.decode(ids))
    return made


def refused(
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


@pytest.mark.parametrize(
    "tokenizer", [BYTES, TokenizerConfig(kind="bpe", vocab_size=300)], ids=["bytes", "bpe"]
)
def test_documents_are_split_and_nothing_is_lost(
    tmp_path: Path, corpus: Path, tokenizer: TokenizerConfig
) -> None:
    made = prepare(
        config(corpus, tokenizer=tokenizer), str(tmp_path / "cache"), seq_length=8
    )
    loaded = Tokenizer.load(made.tokenizer_path, made.end_of_document)
    train = texts_of(made.train[0], loaded)
    validation = texts_of(made.validation[0], loaded)
    assert len(validation) == 6
    assert sorted(train + validation) == sorted(TEXTS)
    assert (made.train[0].num_documents, made.validation[0].num_documents) == (54, 6)
    assert made.train[0].num_tokens == IndexedDataset(made.train[0].prefix).num_tokens
    assert made.vocab_size == loaded.vocab_size
    assert IndexedDataset(made.train[0].prefix).table.dtype == np.uint16


def test_manifest_feeds_datasets(tmp_path: Path, corpus: Path) -> None:
    cache = str(tmp_path / "cache")
    made = prepare(config(corpus), cache, seq_length=8)
    again = type(made).model_validate_json(made.model_dump_json())
    dataset = build_dataset(again.train, 20, 8, 1, cache)
    assert dataset[0].shape == (9,)


def test_second_run_is_a_cache_hit_with_the_same_manifest(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(corpus, tokenizer=TokenizerConfig(vocab_size=300))
    cache = str(tmp_path / "cache")
    said: list[str] = []
    first = prepare(data, cache, seq_length=8, progress=said.append)
    assert any("training a tokenizer of 300 tokens" in line for line in said)
    assert any("60 documents" in line for line in said)

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(prepare_module, "build_corpus", never)
    monkeypatch.setattr(Tokenizer, "train_bpe", never)
    again: list[str] = []
    assert prepare(data, cache, seq_length=8, progress=again.append) == first
    assert prepare(data, f"file://{cache}/", seq_length=8) == first
    assert not again
    assert json.loads(first.model_dump_json()) == json.loads(
        prepare(data, cache, seq_length=4).model_dump_json()
    )


def test_changed_content_and_changed_split_are_made_anew(
    tmp_path: Path, corpus: Path
) -> None:
    cache = str(tmp_path / "cache")
    first = prepare(config(corpus), cache, seq_length=8)
    wider = prepare(config(corpus, validation_fraction=0.5), cache, seq_length=8)
    write(corpus, [*TEXTS, "one more document"])
    changed = prepare(config(corpus), cache, seq_length=8)
    assert len({made.train[0].prefix for made in (first, wider, changed)}) == 3
    assert wider.validation[0].num_documents == 30
    assert changed.train[0].num_documents + changed.validation[0].num_documents == 61


def test_the_split_depends_on_content_only(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", TEXTS)
    second = write(tmp_path / "b.jsonl", TEXTS[::-1])
    held = []
    for path in (first, second):
        made = prepare(config(path), str(tmp_path / "cache"), seq_length=8)
        held.append(sorted(texts_of(made.validation[0], Tokenizer.of_bytes())))
    assert held[0] == held[1]


def test_equal_documents_stay_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS[:20] * 3)
    made = prepare(config(path), str(tmp_path / "cache"), seq_length=8)
    train, validation = (
        set(texts_of(part[0], Tokenizer.of_bytes()))
        for part in (made.train, made.validation)
    )
    assert not train & validation


def test_a_single_document_is_cut_near_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    made = prepare(config(tmp_path / "a.txt"), str(tmp_path / "cache"), seq_length=8)
    train = IndexedDataset(made.train[0].prefix)
    validation = IndexedDataset(made.validation[0].prefix)
    assert bytes(train[0].tolist()) == b"0123456789" * 90 + b"0"
    assert bytes(validation[0][:-1].tolist()) == b"0123456789"[1:] + b"0123456789" * 9
    assert validation[0][-1] == 256


def test_validation_sources_and_no_validation(tmp_path: Path, corpus: Path) -> None:
    other = write(tmp_path / "other.jsonl", ["aaaa bbbb cccc"])
    named = config(corpus, validation=(DataSource(path=str(other), weight=2.0),))
    made = prepare(named, str(tmp_path / "cache"), seq_length=8)
    assert made.train[0].num_documents == 60
    assert texts_of(made.validation[0], Tokenizer.of_bytes()) == ["aaaa bbbb cccc"]
    assert made.validation[0].weight == 2.0
    counts = np.array([4, 4, 4, 2, 1])
    assert made.unigram_nats == pytest.approx(-(counts / 15 * np.log(counts / 15)).sum())
    without = prepare(
        config(corpus, validation_fraction=0), str(tmp_path / "cache"), seq_length=8
    )
    assert (without.validation, without.unigram_nats) == ((), None)
    assert without.train[0].num_documents == 60


def test_unigram_baseline_follows_the_blend() -> None:
    assert unigram_nats([]) is None
    assert unigram_nats([(1.0, np.array([0, 7]))]) == 0.0
    assert unigram_nats(
        [(1.0, np.array([10, 0])), (1.0, np.array([0, 1]))]
    ) == pytest.approx(math.log(2))
    mixed = unigram_nats([(3.0, np.array([10, 0])), (1.0, np.array([0, 1]))])
    assert mixed == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_the_builtin_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = str(Path(sysconfig.get_path("stdlib"), "json"))
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: small)
    made = prepare(config(sources.STDLIB), str(tmp_path / "cache"), seq_length=64)
    assert "def " in "".join(texts_of(made.train[0], Tokenizer.of_bytes()))
    assert made.unigram_nats is not None
    assert 1 < made.unigram_nats < math.log(256)


def ready_made(prefix: Path, documents: list[list[list[int]]]) -> Path:
    with IndexedDatasetBuilder(prefix, np.dtype(np.uint16)) as builder:
        for document in documents:
            for sequence in document:
                builder.add(sequence)
                builder.end_sequence()
            builder.end_document()
    return prefix


def test_prepared_data_are_split_without_a_copy(tmp_path: Path) -> None:
    prefix = ready_made(
        tmp_path / "ready", [[[number, 1], [number, 2, 3, 4, 256]] for number in range(20)]
    )
    made = prepare(config(prefix), str(tmp_path / "cache"), seq_length=4)
    assert Path(made.train[0].prefix + ".bin").resolve() == tmp_path / "ready.bin"
    train = IndexedDataset(made.train[0].prefix)
    validation = IndexedDataset(made.validation[0].prefix)
    assert (train.num_documents, len(train), validation.num_documents, len(validation)) == (
        18,
        36,
        2,
        4,
    )
    firsts = [
        int(part[sequence][0])
        for part in (train, validation)
        for sequence in range(0, len(part), 2)
    ]
    assert sorted(firsts) == list(range(20))
    whole = prepare(
        config(prefix, validation_fraction=0), str(tmp_path / "cache"), seq_length=4
    )
    assert whole.train[0].prefix == str(prefix)
    named = config(prefix, validation=(DataSource(path=f"{prefix}.idx"),))
    assert prepare(named, str(tmp_path / "cache"), seq_length=4).validation[
        0
    ].prefix == str(prefix)


def test_one_prepared_document_is_cut_across_sequences(tmp_path: Path) -> None:
    prefix = ready_made(
        tmp_path / "ready", [[list(range(10)), list(range(10, 30)), list(range(30, 40))]]
    )
    made = prepare(
        config(prefix, validation_fraction=0.4), str(tmp_path / "cache"), seq_length=4
    )
    for part, tokens in ((made.train[0], range(24)), (made.validation[0], range(24, 40))):
        read = IndexedDataset(part.prefix)
        assert [
            token for sequence in range(len(read)) for token in read[sequence].tolist()
        ] == list(tokens)


def test_a_disk_without_links_gets_copies(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = prepare(config(corpus), str(tmp_path / "cache"), seq_length=8)

    def no_links(self: Path, target: str) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    copied = prepare(config(corpus), str(tmp_path / "other"), seq_length=8)
    assert not Path(copied.train[0].prefix + ".bin").is_symlink()
    for split in ("train", "validation"):
        one, two = (
            IndexedDataset(getattr(made, split)[0].prefix) for made in (linked, copied)
        )
        assert [one[i].tolist() for i in range(len(one))] == [
            two[i].tolist() for i in range(len(two))
        ]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like an object store: test://bucket/... is not local."""
    (tmp_path / "bucket").mkdir()
    store = arrow_fs.SubTreeFileSystem(str(tmp_path / "bucket"), arrow_fs.LocalFileSystem())
    monkeypatch.setattr(
        location, "_filesystem_of", lambda uri: (store, uri.removeprefix("test://bucket/"))
    )
    return tmp_path / "bucket"


def test_everything_in_an_object_store(tmp_path: Path, bucket: Path) -> None:
    write(bucket / "corpus.jsonl", TEXTS)
    data = config("test://bucket/corpus.jsonl", tokenizer=TokenizerConfig(vocab_size=300))
    made = prepare(data, "test://bucket/cache/", seq_length=8)
    assert prepare(data, "test://bucket/cache", seq_length=8) == made
    assert made.train[0].prefix.startswith("test://bucket/cache/corpora/")
    loaded = Tokenizer.from_json(
        files.read_bytes(location.parse_location(made.tokenizer_path)).decode(),
        made.end_of_document,
    )
    assert sorted(
        texts_of(made.train[0], loaded) + texts_of(made.validation[0], loaded)
    ) == sorted(TEXTS)
    assert not list((bucket / "cache").rglob("tokens.*"))
    assert build_dataset(made.train, 10, 8, 1, "test://bucket/cache")[3].shape == (9,)
    ready = config(
        made.train[0].prefix,
        tokenizer=TokenizerConfig(kind="file", path=made.tokenizer_path),
    )
    assert (
        prepare(ready, str(tmp_path / "local"), seq_length=8).train[0].num_documents == 49
    )


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_concurrent_prepares_agree(tmp_path: Path, corpus: Path) -> None:
    data = config(corpus, tokenizer=TokenizerConfig(vocab_size=300))
    cache = tmp_path / "cache"
    start = threading.Barrier(4)
    made = []

    def work() -> None:
        start.wait()
        made.append(prepare(data, str(cache), seq_length=8))

    in_threads(4, work)
    assert len(made) == 4
    assert all(one == made[0] for one in made)
    assert not list(cache.rglob(".tmp-*"))


def test_a_killed_prepare_leaves_nothing_that_looks_complete(
    tmp_path: Path, corpus: Path
) -> None:
    cache = tmp_path / "cache"
    code = (
        "import os, sys\n"
        "from megatron_ray.config.data import *\n"
        "from megatron_ray.data.preparation.prepare import prepare\n"
        "data = DataConfig(train=[DataSource(path=sys.argv[1])], "
        "tokenizer=TokenizerConfig(kind='bytes'), validation_fraction=0.1)\n"
        "prepare(data, sys.argv[2], seq_length=8, progress=lambda text: "
        "os.kill(os.getpid(), 9) if 'tokenized' in text else None)\n"
    )
    root = str(Path(__file__).parents[5])
    killed = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(cache)],
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert killed.returncode == -9
    left = list((cache / "corpora").iterdir())
    assert [path.name[:5] for path in left] == [".tmp-"]
    yesterday = time.time() - 2 * 86400
    for path in [*left[0].iterdir(), left[0]]:
        os.utime(path, (yesterday, yesterday))
    made = prepare(config(corpus), str(cache), seq_length=8)
    assert made.train[0].num_documents == 54
    assert not left[0].exists()


def test_a_broken_line_is_named_while_the_tokenizer_is_trained(
    tmp_path: Path, corpus: Path
) -> None:
    broken = write(tmp_path / "broken.jsonl", ["fine"])
    broken.write_text(broken.read_text() + "{broken\n")
    data = config(corpus, broken, tokenizer=TokenizerConfig(vocab_size=300))
    refused(
        data,
        tmp_path / "cache",
        "/data/train/1/path",
        "bad_line",
        "broken.jsonl:2 is not JSON",
    )


def test_the_tokenizer_sees_a_bounded_sample_by_weight(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(tmp_path / "other.jsonl", ["z" * 50] * 50)
    monkeypatch.setattr(tokenizer_choice, "_SAMPLE_CHARS", 400)
    data = DataConfig(
        train=(DataSource(path=str(corpus), weight=3.0), DataSource(path=str(other)))
    )
    sample = "".join(tokenizer_choice.sample_text(sources.find_data(data).train))
    assert (len(sample), sample.count("z")) == (400, 100)


def test_a_failed_prepare_cleans_up_and_a_damaged_artifact_is_made_again(
    tmp_path: Path, corpus: Path
) -> None:
    cache = tmp_path / "cache"
    corpus.write_text(corpus.read_text() + "{broken\n")
    refused(
        config(corpus),
        cache,
        "/data/train/0/path",
        "bad_line",
        "corpus.jsonl:61 is not JSON",
    )
    assert not list((cache / "corpora").iterdir())
    write(corpus, TEXTS)
    made = prepare(config(corpus), str(cache), seq_length=8)
    Path(made.train[0].prefix).with_name("tokens.bin").write_bytes(b"")
    assert prepare(config(corpus), str(cache), seq_length=8) == made
    assert len(IndexedDataset(made.train[0].prefix)) == 54


def test_too_little_text(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", ["abc", "defg"])
    cache = tmp_path / "cache"
    without = config(short, validation_fraction=0)
    refused(
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
    refused(
        config(docs, validation_fraction=0.01),
        cache,
        "/data/validation_fraction",
        "too_short",
        message,
        4,
    )
    named = config(docs, validation=(DataSource(path=str(short)),))
    refused(
        named,
        cache,
        "/data/validation/0/path",
        "too_short",
        "short.jsonl has 9 validation tokens",
        16,
    )


def test_a_small_corpus_of_a_blend_may_sit_out_the_evaluation(
    tmp_path: Path, corpus: Path
) -> None:
    docs = write(tmp_path / "docs.jsonl", [f"{number:03}" for number in range(30)])
    said: list[str] = []
    made = prepare(
        config(corpus, docs, validation_fraction=0.03),
        str(tmp_path / "cache"),
        seq_length=8,
        progress=said.append,
    )
    assert (len(made.train), len(made.validation)) == (2, 1)
    assert any(
        "docs.jsonl: 4 held-out tokens are too few to evaluate on" in line for line in said
    )


def test_empty_sources(tmp_path: Path) -> None:
    refused(
        config(write(tmp_path / "a.jsonl", ["", ""])),
        tmp_path / "c",
        "/data/train/0/path",
        "empty",
        "a.jsonl holds no text",
    )
    ready_made(tmp_path / "none", [])
    refused(
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
    prefix = ready_made(tmp_path / "ready", [[[1, 300, 2]]])
    message = (
        "holds token 300, but the tokenizer has 257 tokens; give the tokenizer the data were "
        "made with"
    )
    refused(config(prefix), tmp_path / "c", "/data/train/0/path", "vocab_mismatch", message)
    trained = config(prefix, tokenizer=TokenizerConfig())
    refused(
        trained,
        tmp_path / "c",
        "/data/tokenizer/kind",
        "tokenizer_needed",
        "/data/train/0/path is already tokenized",
    )
    (tmp_path / "ready.idx").write_bytes(b"nonsense")
    refused(
        config(prefix),
        tmp_path / "c",
        "/data/train/0/path",
        "bad_corpus",
        "is not a Megatron index: .*; prepare the data again",
    )
    with IndexedDatasetBuilder(tmp_path / "signed", np.dtype(np.int32)) as builder:
        builder.add([-1, 2])
        builder.end_document()
    refused(
        config(tmp_path / "signed"),
        tmp_path / "c",
        "/data/train/0/path",
        "vocab_mismatch",
        "holds token -1",
    )
    header = bytearray((tmp_path / "signed.idx").read_bytes())
    header[17] = 7
    (tmp_path / "signed.idx").write_bytes(header)
    refused(
        config(tmp_path / "signed"),
        tmp_path / "c",
        "/data/train/0/path",
        "bad_corpus",
        "holds float32 values, not tokens",
    )


def test_tokenizer_files(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "tokenizer.json"

    def given(end: str | None = None) -> DataConfig:
        return config(
            corpus,
            tokenizer=TokenizerConfig(kind="file", path=str(path), end_of_document=end),
        )

    cache = tmp_path / "cache"
    refused(
        given(),
        cache,
        "/data/tokenizer/path",
        "not_found",
        "tokenizer.json does not exist where the job runs",
    )
    path.write_text("{]")
    refused(
        given(),
        cache,
        "/data/tokenizer/path",
        "bad_tokenizer",
        "not a Hugging Face tokenizer.json",
    )
    path.write_bytes(b"\xff\xfe")
    refused(
        given(),
        cache,
        "/data/tokenizer/path",
        "unreadable",
        "cannot be read: .*give the path of a tokenizer.json",
    )
    Tokenizer.train_bpe(TEXTS, 300).save(path)
    refused(
        given("stop"),
        cache,
        "/data/tokenizer/end_of_document",
        "no_end_token",
        "has no token 'stop'",
    )
    made = prepare(given(), str(cache), seq_length=8)
    assert Path(made.tokenizer_path).is_relative_to(cache)
    other = prepare(given("l"), str(cache), seq_length=8)
    assert other.end_of_document != made.end_of_document
    assert other.train[0].prefix != made.train[0].prefix


def test_a_cache_that_cannot_be_written(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = tmp_path / "file" / "cache"
    refused(
        config(corpus),
        cache,
        "/storage/path",
        "not_writable",
        "prepared data cannot be kept in .*file/cache: .*give a folder",
    )
    refused(
        config(corpus, cache=str(cache)),
        cache,
        "/data/cache",
        "not_writable",
        "cannot be kept",
    )
    refused(
        config(corpus),
        "nowhere://x",
        "/storage/path",
        "not_writable",
        "cannot be kept in nowhere://x",
    )
    refused(
        config(corpus),
        "file://",
        "/storage/path",
        "not_writable",
        "the path is empty or holds a NUL character",
    )
