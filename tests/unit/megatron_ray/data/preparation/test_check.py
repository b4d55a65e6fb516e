"""The quick check: what it sees, what it leaves alone, and that it leaves nothing
behind.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.data.indexed import IndexedDatasetBuilder
from megatron_ray.data.preparation.check import check_data


def config(path: Path | str, **changes: Any) -> DataConfig:
    return DataConfig(train=(DataSource(path=str(path)),), **changes)


def problem_codes(
    data: DataConfig, storage: Path | str, seq_length: int = 8
) -> list[tuple[str, str]]:
    return [
        (problem.pointer, problem.code)
        for problem in check_data(data, seq_length, str(storage)).problems
    ]


def long_text(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("word " * 100)
    return tmp_path / "a.txt"


def test_good_data_have_no_problems_and_nothing_is_left_behind(tmp_path: Path) -> None:
    data = config(long_text(tmp_path), cache=str(tmp_path / "new" / "cache"))
    before = sorted(tmp_path.rglob("*"))
    assert problem_codes(data, tmp_path / "jobs" / "job-1") == []
    assert sorted(tmp_path.rglob("*")) == before


def test_the_builtin_corpus_is_fine(tmp_path: Path) -> None:
    assert problem_codes(config("builtin://python-stdlib"), tmp_path, 1024) == []


def test_missing_path_and_unreadable_first_document(tmp_path: Path) -> None:
    assert problem_codes(config(tmp_path / "no"), tmp_path) == [
        ("/data/train/0/path", "not_found")
    ]
    (tmp_path / "d.jsonl").write_text("{broken\n")
    assert problem_codes(config(tmp_path / "d.jsonl"), tmp_path) == [
        ("/data/train/0/path", "bad_line")
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps({"body": "x" * 99}) + "\n")
    assert problem_codes(config(tmp_path / "d.jsonl"), tmp_path) == [
        ("/data/train/0/text_key", "text_key")
    ]
    (tmp_path / "d.jsonl").write_text("\n\n")
    assert problem_codes(config(tmp_path / "d.jsonl"), tmp_path) == [
        ("/data/train/0/path", "empty")
    ]


def test_surely_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 16)
    no_validation = config(tmp_path / "a.txt", validation_fraction=0)
    assert problem_codes(no_validation, tmp_path, 16) == []
    (problem,) = check_data(no_validation, 17, str(tmp_path)).problems
    assert (problem.pointer, problem.code) == ("/data/train/0/path", "too_short")
    assert (
        "has at most 17 tokens, but at least 18 are needed for samples of seq_length + 1; "
        "give more text" in problem.detail
    )
    assert problem_codes(config(tmp_path / "a.txt"), tmp_path, 8) == [
        ("/data/train/0/path", "too_short")
    ]
    (tmp_path / "long").mkdir()
    long = long_text(tmp_path / "long")
    both = config(long, validation=(DataSource(path=str(tmp_path / "a.txt")),))
    assert problem_codes(both, tmp_path, 30) == [("/data/validation/0/path", "too_short")]


def test_size_tells_nothing_for_parquet_and_foreign_tokenizers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert problem_codes(config(tmp_path / "a.parquet"), tmp_path, 100_000) == []


def test_prepared_data(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "c", np.dtype(np.uint16)) as builder:
        builder.add([1] * 20)
        builder.end_document()
    data = config(
        tmp_path / "c", tokenizer=TokenizerConfig(kind="bytes"), validation_fraction=0
    )
    assert problem_codes(data, tmp_path, 19) == []
    assert problem_codes(data, tmp_path, 20) == [("/data/train/0/path", "too_short")]
    assert problem_codes(config(tmp_path / "c"), tmp_path, 4) == [
        ("/data/tokenizer/kind", "tokenizer_needed")
    ]
    (tmp_path / "c.idx").write_bytes(b"x")
    assert problem_codes(data, tmp_path, 4) == [("/data/train/0/path", "bad_corpus")]


def test_tokenizer_file(tmp_path: Path) -> None:
    data = config(
        long_text(tmp_path),
        tokenizer=TokenizerConfig(kind="file", path=str(tmp_path / "t.json")),
    )
    assert problem_codes(data, tmp_path) == [("/data/tokenizer/path", "not_found")]
    (tmp_path / "t.json").write_text("{}")
    assert problem_codes(data, tmp_path) == [("/data/tokenizer/path", "bad_tokenizer")]


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    text = long_text(tmp_path)
    assert problem_codes(config(text), text / "jobs") == [("/storage/path", "not_writable")]
    assert problem_codes(config(text, cache=str(text)), tmp_path) == [
        ("/data/cache", "not_writable")
    ]
    (problem,) = check_data(config(text), 8, "nowhere://x/y").problems
    assert problem.pointer == "/storage/path"
    assert "nowhere://x/y cannot be written where the job runs: " in problem.detail
    assert problem.detail.endswith("give a folder or URI that it may write")


def test_the_first_rows_are_checked_and_what_is_left_out_is_noted(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [json.dumps({"text": "word " * 9})] * 20
    rows[10] = "no json"
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "test.jsonl").write_text(rows[0])
    (problem,) = check_data(config(folder), 8, str(tmp_path)).problems
    assert "1 of the first 20 rows cannot be read: " in problem.detail
    assert "train.jsonl:11 is not JSON" in problem.detail
    source = DataSource(path=str(folder), max_bad_records=1)
    checked = check_data(DataConfig(train=(source,)), 8, str(tmp_path))
    assert checked.problems == []
    assert checked.notes == [f"{folder}: 1 file (test.jsonl) of test data: not trained on"]


def test_the_first_files_and_one_of_each_format_are_checked(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 9}) + "\n"
    for name in ("a", "c", "d", "e", "f"):
        (tmp_path / f"{name}.jsonl").write_text(row * 9)
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert check_data(config(tmp_path), 8, str(tmp_path)).problems == []
    (tmp_path / "g.txt").write_text("gr\u00fcn", encoding="latin-1")
    (problem,) = check_data(config(tmp_path), 8, str(tmp_path)).problems
    assert "g.txt is not UTF-8 text" in problem.detail
    (tmp_path / "d.jsonl").write_text(row.replace("text", "body"))
    (problem,) = check_data(config(tmp_path), 8, str(tmp_path)).problems
    assert "d.jsonl has no field 'text' in its first 1 lines" in problem.detail
