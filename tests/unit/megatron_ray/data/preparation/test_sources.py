"""Finding and reading sources; every message a user can get."""

import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.data.preparation.data_files import find_data
from megatron_ray.data.preparation.documents import fingerprint, read_chunks
from megatron_ray.data.preparation.errors import DataError
from megatron_ray.data.preparation.formats import records
from megatron_ray.data.preparation.formats import text as text_module
from megatron_ray.data.preparation.sources import STDLIB, find_source, in_sampling_order


def documents(path: Path | str, text_key: str = "text") -> list[str]:
    texts = []
    current = ""
    for chunk in read_chunks(find_source(DataSource(path=str(path), text_key=text_key))):
        current += chunk.text
        if chunk.ends_document:
            texts.append(current)
            current = ""
    assert not current
    return texts


def jsonl(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def assert_refused(
    path: Path | str, code: str, message: str, field: str = "path", text_key: str = "text"
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        documents(path, text_key)
    assert (caught.value.code, caught.value.field) == (code, field)
    assert caught.value.problem("/data/train/0").pointer == f"/data/train/0/{field}"


def test_kinds_read_the_same_documents(tmp_path: Path) -> None:
    texts = ["one\r\ntwo\n", "drei ü 日本", "four"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    jsonl(tmp_path / "d.jsonl", *texts)
    pq.write_table(pa.table({"text": [*texts, None, ""]}), tmp_path / "d.parquet")
    assert documents(tmp_path / "d.jsonl") == texts
    assert documents(tmp_path / "d.parquet") == texts
    assert documents(tmp_path / "?.txt") == texts
    assert documents(f"file://{tmp_path}/1.txt") == texts[1:2]
    assert documents(tmp_path) == texts * 3


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(min_size=1))
def test_long_documents_come_whole_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(records, "_CHUNK_CHARS", 5)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", errors="replace", newline="")
    written = (tmp_path / "a.txt").read_bytes().decode()
    assert documents(tmp_path / "a.txt") == [written]


def test_long_rows_come_in_the_pieces_of_text_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK_CHARS", 4)
    texts = ["abcdef\r\nghi\nj", "k", "lmno"]
    jsonl(tmp_path / "a.jsonl", *texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        source = find_source(DataSource(path=str(tmp_path / name)))
        assert list(read_chunks(source)) == [
            ("abcdef\r\n", False),
            ("ghi\n", False),
            ("j", True),
            ("k", True),
            ("lmno", True),
        ]


def test_pieces_end_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK_CHARS", 4)
    (tmp_path / "a.txt").write_text("abcdef\nghi\nj")
    assert [
        chunk.text
        for chunk in read_chunks(find_source(DataSource(path=str(tmp_path / "a.txt"))))
    ] == [
        "abcdef\n",
        "ghi\n",
        "j",
    ]


def test_folders_are_walked_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a/y.txt", ".git/x.txt", "_logs/w.txt", "a/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a/y.txt", "b/z.txt"]
    assert documents(tmp_path / "**" / "*.txt") == [
        ".git/x.txt",
        "_logs/w.txt",
        "a/y.txt",
        "b/z.txt",
    ]
    assert documents(tmp_path / "[ab]" / "*.txt") == ["a/y.txt", "b/z.txt"]


def test_a_name_with_wildcards_that_exists_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "[a].txt").write_text("brackets")
    assert documents(tmp_path / "[a].txt") == ["brackets"]


def test_standard_library() -> None:
    source = find_source(DataSource(path=STDLIB))
    folder = sysconfig.get_path("stdlib")
    names = [file.path.removeprefix(folder) for file in source.files]
    assert names == sorted(names)
    assert "/json/decoder.py" in names
    assert not [name for name in names if "/site-packages/" in name or "/test/" in name]
    assert source.num_bytes > 5e6
    assert fingerprint(source) == fingerprint(find_source(DataSource(path=STDLIB)))
    assert sorted(in_sampling_order(source), key=lambda file: file.path) == list(
        source.files
    )


def test_fingerprint_changes_with_content(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", "a")
    before = fingerprint(find_source(DataSource(path=str(path))))
    assert fingerprint(find_source(DataSource(path=str(path), weight=3.0))) == before
    assert fingerprint(find_source(DataSource(path=str(path), text_key="other"))) != before
    jsonl(path, "a", "b")
    assert fingerprint(find_source(DataSource(path=str(path)))) != before


def test_paths_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "half.idx").write_text("x")
    assert_refused(
        tmp_path / "missing.txt",
        "not_found",
        r"missing.txt does not exist where the job runs; check the path, .*give .txt, .jsonl",
    )
    assert_refused(tmp_path / "*.txt2", "not_found", r"no file matches .*\*.txt2")
    assert_refused(tmp_path / "no" / "*.txt", "not_found", "no file matches")
    assert_refused(tmp_path / "empty.txt", "empty", "empty.txt is empty")
    assert_refused(
        tmp_path / "notes.pdf",
        "file_type",
        r"notes.pdf is of a type that cannot be read; give .txt",
    )
    assert_refused(tmp_path / "*.pdf", "file_type", "notes.pdf is of a type")
    assert_refused(
        tmp_path / "folder", "no_files", "holds no .txt, .jsonl, .parquet, .arrow file"
    )
    assert_refused(
        tmp_path / "half", "incomplete_prefix", "half.bin is missing beside its neighbour"
    )
    assert_refused(
        "builtin://shakespeare",
        "unknown_builtin",
        "there are builtin://python-stdlib and builtin://mock",
    )
    assert_refused(
        "~nobody-of-this-name/x",
        "bad_uri",
        "the home folder in ~nobody-of-this-name/x is not known",
    )
    assert_refused("a\0b", "bad_uri", "the path is empty or holds a NUL character")
    assert_refused(
        "nowhere://bucket/x", "bad_uri", "nowhere://bucket/x is not a valid path or URI"
    )


@pytest.mark.parametrize(
    ("line", "code", "message", "field"),
    [
        (
            '{"text": "a',
            "bad_line",
            r"d.jsonl:3 is not JSON .*; correct or remove the line",
            "path",
        ),
        (
            '["a"]',
            "bad_line",
            r"d.jsonl:3 is a list, not an object with a field 'text'",
            "path",
        ),
        (
            '{"text": 5}',
            "text_key",
            r"d.jsonl:3: field 'text' is a number, not text",
            "text_key",
        ),
        ("[" * 100_000, "bad_line", r"d.jsonl:3 is not JSON", "path"),
    ],
)
def test_jsonl_lines_that_are_wrong(
    tmp_path: Path, line: str, code: str, message: str, field: str
) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    assert_refused(tmp_path / "d.jsonl", code, message, field)


@pytest.mark.parametrize(
    ("line", "fields"),
    [('{"body": "a", "id": 1}', "body, id"), ("{}", "none")],
)
def test_a_field_that_no_line_has(tmp_path: Path, line: str, fields: str) -> None:
    (tmp_path / "d.jsonl").write_text(f"{line}\n\n{line}\n")
    message = (
        rf"d.jsonl has no field 'text' in its first 2 lines \(fields of the first: {fields}\); "
        "set text_key to the field with the text"
    )
    assert_refused(tmp_path / "d.jsonl", "text_key", message, "text_key")


def test_parquet_that_is_wrong(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "d.parquet")
    assert_refused(
        tmp_path / "d.parquet",
        "text_key",
        r"d.parquet has no column 'text' \(its columns: body, id\)",
        "text_key",
    )
    assert_refused(
        tmp_path / "d.parquet",
        "text_key",
        "column 'id' is int64, not text",
        "text_key",
        text_key="id",
    )
    assert documents(tmp_path / "d.parquet", "body") == ["a"]
    (tmp_path / "e.parquet").write_text("not parquet")
    assert_refused(tmp_path / "e.parquet", "file_type", "e.parquet is not a Parquet file")


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    assert_refused(
        tmp_path / "a.txt",
        "not_utf8",
        r"a.txt is not UTF-8 text \(byte 0xfc\); convert it to UTF-8",
    )


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def deny(error: OSError) -> None:
        def opener(*_: object) -> None:
            raise error

        monkeypatch.setattr(text_module, "open_stream", opener)

    deny(PermissionError(13, "denied"))
    assert_refused(
        tmp_path / "a.txt",
        "unreadable",
        "a.txt may not be read by the user that runs the job",
    )
    deny(OSError(5, "the disk is tired"))
    assert_refused(
        tmp_path / "a.txt",
        "unreadable",
        "a.txt cannot be read: .*the disk is tired; check the path and the credentials",
    )
    deny(FileNotFoundError(2, "gone"))
    assert_refused(tmp_path / "a.txt", "not_found", "a.txt does not exist")


def test_find_all_gathers_problems(tmp_path: Path) -> None:
    jsonl(tmp_path / "d.jsonl", "a")
    (tmp_path / "c.bin").write_text("x")
    (tmp_path / "c.idx").write_text("x")
    good, ready, missing = (
        DataSource(path=str(tmp_path / name)) for name in ("d.jsonl", "c", "nothing")
    )
    data = find_data(DataConfig(train=(good, missing, ready), validation=(missing,)))
    assert [(problem.pointer, problem.code) for problem in data.problems] == [
        ("/data/train/1/path", "not_found"),
        ("/data/validation/0/path", "not_found"),
        ("/data/tokenizer/kind", "tokenizer_needed"),
    ]
    assert "/data/train/2/path is already tokenized" in data.problems[-1].detail
    assert [owner for owner, _ in data.train] == ["/data/train/0", "/data/train/2"]
    with_bytes = DataConfig(train=(ready,), tokenizer=TokenizerConfig(kind="bytes"))
    assert not find_data(with_bytes).problems
    assert find_source(DataSource(path=str(tmp_path / "c.bin"))).root.path == str(
        tmp_path / "c"
    )
