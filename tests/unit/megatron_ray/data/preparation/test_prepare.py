"""Preparing: splits, reuse, concurrency, death in the middle, object stores."""

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

import numpy as np
import pytest
from pyarrow import fs as arrow_fs

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.data.datasets import build_dataset
from megatron_ray.data.indexed import IndexedDataset
from megatron_ray.data.preparation import built_corpora, sources, tokenizer_choice
from megatron_ray.data.preparation.data_files import find_data
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.preparation.prepare import prepare, unigram_nats
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.storage import files, location
from tests.support.corpus_files import (
    BYTES,
    TEXTS,
    assert_refused,
    config,
    texts_of,
    write,
    write_prepared,
)


@pytest.mark.parametrize(
    "tokenizer", [BYTES, TokenizerConfig(kind="bpe", vocab_size=300)], ids=["bytes", "bpe"]
)
def test_documents_are_split_and_nothing_is_lost(
    tmp_path: Path, corpus: Path, tokenizer: TokenizerConfig
) -> None:
    prepared = prepare(
        config(corpus, tokenizer=tokenizer), str(tmp_path / "cache"), seq_length=8
    )
    loaded = Tokenizer.load(prepared.tokenizer_path, prepared.end_of_document)
    train = texts_of(prepared.train[0], loaded)
    validation = texts_of(prepared.validation[0], loaded)
    assert len(validation) == 6
    assert sorted(train + validation) == sorted(TEXTS)
    assert (prepared.train[0].num_documents, prepared.validation[0].num_documents) == (
        54,
        6,
    )
    assert (
        prepared.train[0].num_tokens == IndexedDataset(prepared.train[0].prefix).num_tokens
    )
    assert prepared.vocab_size == loaded.vocab_size
    assert IndexedDataset(prepared.train[0].prefix).table.dtype == np.uint16


def test_manifest_feeds_datasets(tmp_path: Path, corpus: Path) -> None:
    cache = str(tmp_path / "cache")
    prepared = prepare(config(corpus), cache, seq_length=8)
    again = type(prepared).model_validate_json(prepared.model_dump_json())
    dataset = build_dataset(again.train, 20, 8, 1, cache)
    assert dataset[0].shape == (9,)


def test_second_run_is_a_cache_hit_with_the_same_manifest(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(corpus, tokenizer=TokenizerConfig(vocab_size=300))
    cache = str(tmp_path / "cache")
    messages: list[str] = []
    first = prepare(data, cache, seq_length=8, progress=messages.append)
    assert any("training a tokenizer of 300 tokens" in line for line in messages)
    assert any("60 documents" in line for line in messages)

    def never(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(built_corpora, "build_corpus", never)
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
    assert len({prepared.train[0].prefix for prepared in (first, wider, changed)}) == 3
    assert wider.validation[0].num_documents == 30
    assert changed.train[0].num_documents + changed.validation[0].num_documents == 61


def test_the_split_depends_on_content_only(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", TEXTS)
    second = write(tmp_path / "b.jsonl", TEXTS[::-1])
    held_out = []
    for path in (first, second):
        prepared = prepare(config(path), str(tmp_path / "cache"), seq_length=8)
        held_out.append(sorted(texts_of(prepared.validation[0], Tokenizer.of_bytes())))
    assert held_out[0] == held_out[1]


def test_equal_documents_stay_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS[:20] * 3)
    prepared = prepare(config(path), str(tmp_path / "cache"), seq_length=8)
    train, validation = (
        set(texts_of(part[0], Tokenizer.of_bytes()))
        for part in (prepared.train, prepared.validation)
    )
    assert not train & validation


def test_a_single_document_is_cut_near_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    prepared = prepare(config(tmp_path / "a.txt"), str(tmp_path / "cache"), seq_length=8)
    train = IndexedDataset(prepared.train[0].prefix)
    validation = IndexedDataset(prepared.validation[0].prefix)
    assert bytes(train[0].tolist()) == b"0123456789" * 90 + b"0"
    assert bytes(validation[0][:-1].tolist()) == b"0123456789"[1:] + b"0123456789" * 9
    assert validation[0][-1] == 256


def test_validation_sources_and_no_validation(tmp_path: Path, corpus: Path) -> None:
    other = write(tmp_path / "other.jsonl", ["aaaa bbbb cccc"])
    named = config(corpus, validation=(DataSource(path=str(other), weight=2.0),))
    prepared = prepare(named, str(tmp_path / "cache"), seq_length=8)
    assert prepared.train[0].num_documents == 60
    assert texts_of(prepared.validation[0], Tokenizer.of_bytes()) == ["aaaa bbbb cccc"]
    assert prepared.validation[0].weight == 2.0
    counts = np.array([4, 4, 4, 2, 1])
    assert prepared.unigram_nats == pytest.approx(
        -(counts / 15 * np.log(counts / 15)).sum()
    )
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


def test_random_words_are_prepared_as_any_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "NUM_PARTS", 1)
    prepared = prepare(config(sources.MOCK), str(tmp_path / "cache"), seq_length=64)
    assert sum(corpus.num_tokens for corpus in prepared.train) > 1 << 18
    assert sum(corpus.num_tokens for corpus in prepared.validation) > 1 << 14


def test_the_builtin_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = str(Path(sysconfig.get_path("stdlib"), "json"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: small)
    prepared = prepare(config(sources.STDLIB), str(tmp_path / "cache"), seq_length=64)
    assert "def " in "".join(texts_of(prepared.train[0], Tokenizer.of_bytes()))
    assert prepared.unigram_nats is not None
    assert 1 < prepared.unigram_nats < math.log(256)


def test_prepared_data_are_split_without_a_copy(tmp_path: Path) -> None:
    prefix = write_prepared(
        tmp_path / "ready", [[[number, 1], [number, 2, 3, 4, 256]] for number in range(20)]
    )
    prepared = prepare(config(prefix), str(tmp_path / "cache"), seq_length=4)
    assert Path(prepared.train[0].prefix + ".bin").resolve() == tmp_path / "ready.bin"
    train = IndexedDataset(prepared.train[0].prefix)
    validation = IndexedDataset(prepared.validation[0].prefix)
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
    prefix = write_prepared(
        tmp_path / "ready", [[list(range(10)), list(range(10, 30)), list(range(30, 40))]]
    )
    prepared = prepare(
        config(prefix, validation_fraction=0.4), str(tmp_path / "cache"), seq_length=4
    )
    for part, tokens in (
        (prepared.train[0], range(24)),
        (prepared.validation[0], range(24, 40)),
    ):
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
            IndexedDataset(getattr(prepared, split)[0].prefix)
            for prepared in (linked, copied)
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
    prepared = prepare(data, "test://bucket/cache/", seq_length=8)
    assert prepare(data, "test://bucket/cache", seq_length=8) == prepared
    assert prepared.train[0].prefix.startswith("test://bucket/cache/corpora/")
    loaded = Tokenizer.from_json(
        files.read_bytes(location.parse_location(prepared.tokenizer_path)).decode(),
        prepared.end_of_document,
    )
    assert sorted(
        texts_of(prepared.train[0], loaded) + texts_of(prepared.validation[0], loaded)
    ) == sorted(TEXTS)
    assert not list((bucket / "cache").rglob("tokens.*"))
    assert build_dataset(prepared.train, 10, 8, 1, "test://bucket/cache")[3].shape == (9,)
    ready = config(
        prepared.train[0].prefix,
        tokenizer=TokenizerConfig(kind="file", path=prepared.tokenizer_path),
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
    prepared = []

    def work() -> None:
        start.wait()
        prepared.append(prepare(data, str(cache), seq_length=8))

    in_threads(4, work)
    assert len(prepared) == 4
    assert all(one == prepared[0] for one in prepared)
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
    prepared = prepare(config(corpus), str(cache), seq_length=8)
    assert prepared.train[0].num_documents == 54
    assert not left[0].exists()


def test_the_tokenizer_sees_a_bounded_sample_by_weight(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(tmp_path / "other.jsonl", ["z" * 50] * 50)
    monkeypatch.setattr(tokenizer_choice, "_SAMPLE_CHARS", 400)
    data = DataConfig(
        train=(DataSource(path=str(corpus), weight=3.0), DataSource(path=str(other)))
    )
    sample = "".join(tokenizer_choice.sample_text(find_data(data).train))
    assert (len(sample), sample.count("z")) == (400, 100)


def test_a_failed_prepare_cleans_up_and_a_damaged_artifact_is_made_again(
    tmp_path: Path, corpus: Path
) -> None:
    cache = tmp_path / "cache"
    corpus.write_text(corpus.read_text() + "{broken\n")
    assert_refused(
        config(corpus),
        cache,
        "/data/train/0/path",
        "bad_line",
        "corpus.jsonl:61 is not JSON",
    )
    assert not list((cache / "corpora").iterdir())
    write(corpus, TEXTS)
    prepared = prepare(config(corpus), str(cache), seq_length=8)
    Path(prepared.train[0].prefix).with_name("tokens.bin").write_bytes(b"")
    assert prepare(config(corpus), str(cache), seq_length=8) == prepared
    assert len(IndexedDataset(prepared.train[0].prefix)) == 54


def test_a_small_corpus_of_a_blend_may_sit_out_the_evaluation(
    tmp_path: Path, corpus: Path
) -> None:
    docs = write(tmp_path / "docs.jsonl", [f"{number:03}" for number in range(30)])
    messages: list[str] = []
    prepared = prepare(
        config(corpus, docs, validation_fraction=0.03),
        str(tmp_path / "cache"),
        seq_length=8,
        progress=messages.append,
    )
    assert (len(prepared.train), len(prepared.validation)) == (2, 1)
    assert any(
        "docs.jsonl: 4 held-out tokens are too few to evaluate on" in line
        for line in messages
    )


def test_what_is_left_out_is_in_the_manifest_of_every_run(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", TEXTS)
    write(folder / "dev.jsonl", ["held out " * 4] * 3)
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": null}\nno json\n')
    source = DataSource(path=str(folder), max_bad_records=1)
    data = DataConfig(train=(source,), tokenizer=BYTES)
    messages: list[str] = []
    for _ in range(2):
        prepared = prepare(
            data, str(tmp_path / "cache"), seq_length=8, progress=messages.append
        )
        # The validation files replace a share of the documents.
        assert prepared.train[0].num_documents == 60
        assert prepared.validation[0].num_documents == 3
        assert [note.removeprefix(f"{folder}: ")[:40] for note in prepared.notes] == [
            "1 file (dev.jsonl) of validation data: n",
            "1 file (dev.jsonl) evaluated on",
            "1 of 62 rows has no text: left out",
            "1 of 62 rows cannot be read, left out: /",
        ]
        assert messages[-4:] == list(prepared.notes)
    stricter = source.model_copy(update={"max_bad_records": 0})
    with pytest.raises(UnusableDataError, match="1 of 62 rows cannot be read: "):
        prepare(DataConfig(train=(stricter,)), str(tmp_path / "cache"), seq_length=8)


def test_a_blend_is_evaluated_on_validation_files_and_held_out_documents(
    tmp_path: Path, corpus: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", TEXTS)
    write(folder / "valid.jsonl", ["held out " * 4] * 3)
    prepared = prepare(config(corpus, folder), str(tmp_path / "cache"), seq_length=8)
    assert [part.num_documents for part in prepared.train] == [54, 60]
    assert sorted(part.num_documents for part in prepared.validation) == [3, 6]
    # Too short to evaluate on, they are no reason to end the job.
    write(folder / "valid.jsonl", ["x"])
    prepared = prepare(config(corpus, folder), str(tmp_path / "cache"), seq_length=8)
    assert [part.num_documents for part in prepared.validation] == [6]
    message = "seq_length \\+ 1 = 9; lower training.seq_length, name data.validation"
    with pytest.raises(UnusableDataError, match=message):
        prepare(config(folder), str(tmp_path / "cache"), seq_length=8)
