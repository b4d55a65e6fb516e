"""Formats agree about which records have text, and about what is wrong with the others."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ray.config.data import DataSource
from megatron_ray.data.preparation.documents import read_chunks
from megatron_ray.data.preparation.errors import DataError
from megatron_ray.data.preparation.formats import records
from megatron_ray.data.preparation.formats.records import RecordTally
from megatron_ray.data.preparation.sources import find_source

MARK = "\ufeff"


def read(path: Path | str, **changes: Any) -> tuple[list[str], RecordTally]:
    """Returns the documents of a source and its tally."""
    source = find_source(DataSource(path=str(path), **changes))
    tally = RecordTally(source.source.max_bad_records)
    return [chunk.text for chunk in read_chunks(source, tally)], tally


def refusal(path: Path | str, **changes: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **changes)
    return caught.value


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


COMPRESSIONS = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files_are_read_as_the_files_in_them(
    tmp_path: Path, suffix: str
) -> None:
    compress: Callable[[bytes], bytes] = COMPRESSIONS[suffix]
    rows = lines({"text": "one"}, {"text": "two"})
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(rows))
    (tmp_path / f"b.JSON{suffix}").write_bytes(compress(rows))
    (tmp_path / f"c.txt{suffix}").write_bytes(compress(b"three"))
    # Several streams one after the other, as parallel compressors write them.
    (tmp_path / f"d.jsonl{suffix}").write_bytes(compress(rows) + compress(rows))
    assert read(tmp_path)[0] == ["one", "two"] * 2 + ["three"] + ["one", "two"] * 2
    damaged = tmp_path / f"a.jsonl{suffix}"
    damaged.write_bytes(compress(rows * 1000)[:-12])
    detail = refusal(damaged).detail
    assert f"a.jsonl{suffix} cannot be read: " in detail
    assert detail.endswith("; check that the file is complete, or unpack it")


def test_json_files_hold_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(lines({"text": "one"}))
    (tmp_path / "b.ndjson").write_bytes(lines({"text": "two"}))
    assert read(tmp_path)[0] == ["one", "two"]
    for content in ('[\n{"text": "a"}\n]', '[{"text": "a"}]', '{\n "text": "a"\n}'):
        (tmp_path / "a.json").write_text(content)
        error = refusal(tmp_path / "a.json")
        assert error.code == "file_type"
        assert (
            "is one JSON value, not JSON lines; write one object per line" in error.detail
        )
        command = "jq -c '.[]'"
        if content.startswith("{"):
            command = "jq -c '.'"
        assert error.detail.endswith(f"with: {command} {tmp_path}/a.json")
    path = tmp_path / "a b.json.zst"
    path.write_bytes(zstd(b'[{"text": "a"}]'))
    assert refusal(path).detail.endswith(f"with: zstd -dc '{path}' | jq -c '.[]'")


def tar(data: bytes) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            member = tarfile.TarInfo("a.jsonl")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        return file.getvalue()


def parquet(*texts: str | None) -> bytes:
    with io.BytesIO() as file:
        pq.write_table(pa.table({"text": texts}), file)
        return file.getvalue()


def arrow_file(*texts: str | None) -> bytes:
    """A file with batches of 1,000 rows and a table of them, as Feather is."""
    table = pa.table({"text": pa.array(texts, pa.string()), "id": range(len(texts))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return bytes(sink.getvalue())


def arrow_stream(*texts: str | None) -> bytes:
    """As Hugging Face's datasets writes its files."""
    table = pa.table({"text": pa.array(texts, pa.string()), "id": range(len(texts))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return bytes(sink.getvalue())


ROWS = lines(*[{"text": "gr\u00fcn \u4e0a"}] * 20)
GZIPPED = gzip.compress(ROWS, mtime=0)
OTHER_CONTENTS = [
    ("a.jsonl", GZIPPED, "a.jsonl is compressed with gzip; add .gz to its name"),
    ("a.txt", zstd(ROWS), "a.txt is compressed with zstd; add .zst to its name"),
    ("a.json", bz2.compress(ROWS), "is compressed with bzip2; add .bz2 to its name"),
    ("a.txt", lzma.compress(ROWS), "a.txt is compressed with xz; add .xz to its name"),
    (
        "a.jsonl.gz",
        gzip.compress(GZIPPED, mtime=0),
        "a.jsonl.gz is compressed with gzip; unpack it",
    ),
    (
        "a.jsonl.gz",
        gzip.compress(tar(ROWS), mtime=0),
        "a.jsonl.gz is a tar archive; unpack it",
    ),
    ("a.txt", tar(ROWS), "a.txt is a tar archive; unpack it"),
    ("a.jsonl", parquet("a"), "is a Parquet file; let its name end in .parquet"),
    ("a.txt", arrow_file("a"), "a.txt is an Arrow file; let its name end in .arrow"),
    ("a.txt", ROWS.decode().encode("utf-16"), "a.txt is UTF-16 text; convert it to UTF-8"),
    ("a.txt", ROWS.decode().encode("utf-16-le"), "a.txt is UTF-16 text; convert it"),
    ("a.jsonl", ROWS.decode().encode("utf-16-le"), "a.jsonl is UTF-16 text; convert it"),
    ("a.jsonl", ROWS.decode().encode("utf-16-be"), "a.jsonl is UTF-16 text; convert it"),
    ("a.txt", bytes(1000), "a.txt holds zero bytes in place of text; restore it"),
]


@pytest.mark.parametrize(("name", "content", "message"), OTHER_CONTENTS)
def test_files_with_other_contents_than_their_names_are_refused_with_a_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name).detail


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_files_that_were_unpacked_under_their_names_are_refused_with_a_remedy(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(ROWS)
    detail = f"{path} is not compressed; take {suffix} off its name"
    assert refusal(path).detail == detail


def test_a_text_file_with_other_contents_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(GZIPPED)
    (tmp_path / "b.txt").write_text("b")
    texts, tally = read(tmp_path, max_bad_records=1)
    assert (texts, tally.num_bad) == (["b"], 1)


def test_utf8_is_read_as_utf8_whatever_zero_bytes_are_in_it(tmp_path: Path) -> None:
    row = {"text": "a\0" * 40}
    (tmp_path / "a.jsonl").write_bytes(lines(row) + b'\0{\0"\0t\0"\0}\0\n')
    texts, tally = read(tmp_path, max_bad_records=1)
    assert (texts, tally.num_bad) == ([row["text"]], 1)


def test_files_that_hold_nothing_are_noted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}))
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert read(tmp_path)[1].notes("d") == [f"d: 1 file holds nothing: {tmp_path}/b.jsonl"]
    for name in ("c.jsonl.gz", "d.jsonl.gz", "e.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"\n", mtime=0))
    (tmp_path / "f.parquet").write_bytes(parquet())
    (note,) = read(tmp_path)[1].notes("d")
    shown = ", ".join(f"{tmp_path}/{name}" for name in ("b.jsonl", "c.jsonl.gz"))
    assert note == f"d: 5 files hold nothing: {shown}, {tmp_path}/d.jsonl.gz, ..."


def test_damaged_parquet_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    content = parquet(*(str(number) for number in range(5000)))
    path.write_bytes(content[:-9])
    assert refusal(path).detail.endswith(
        "check that it is complete, or name it by what it holds"
    )
    path.write_bytes(content[:10] + b"\xff" * 500 + content[510:])
    assert refusal(path).detail.endswith("; check that the file is complete")


@pytest.mark.parametrize("write", [arrow_file, arrow_stream])
def test_arrow_files_and_streams_are_read(
    tmp_path: Path, write: Callable[..., bytes]
) -> None:
    texts = [f"text {number}" for number in range(2500)]
    (tmp_path / "data-00000-of-00002.arrow").write_bytes(write(*texts[:1500]))
    (tmp_path / "data-00001-of-00002.arrow").write_bytes(write(*texts[1500:]))
    (tmp_path / "cache-0123456789abcdef.arrow").write_bytes(write("of a function"))
    (tmp_path / "state.json").write_text("{}")
    documents, tally = read(tmp_path)
    assert documents == texts
    assert tally.num_records == 2500
    error = refusal(tmp_path / "data-00000-of-00002.arrow", text_key="id")
    assert "column 'id' is int64, not text; set text_key to a text column" in error.detail
    error = refusal(tmp_path / "data-00000-of-00002.arrow", text_key="body")
    assert "has no column 'body' (its columns: text, id)" in error.detail


def test_damaged_arrow_files_are_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    texts = [f"text {number}" for number in range(2500)]
    path.write_bytes(arrow_file(*texts)[:-9])
    assert refusal(path).detail.endswith(
        "check that it is complete, or name it by what it holds"
    )
    path.write_bytes(arrow_stream(*texts)[:-5000])
    assert refusal(path).detail.endswith("; check that the file is complete")
    path.write_bytes(b"some text")
    assert "is not an Arrow file" in refusal(path).detail
    path.write_bytes(b"FEA1" + bytes(100))
    assert "version 1 of Feather, which is not read; convert it" in refusal(path).detail


@pytest.fixture(params=["d.jsonl", "d.parquet", "d.arrow"])
def rows_without_text(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of four rows, of which one has no text and one an empty text."""
    path = tmp_path / str(request.param)
    texts = ["a", None, "", "b"]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif path.suffix == ".arrow":
        path.write_bytes(arrow_file(*texts))
    else:
        path.write_bytes(lines(*({"text": text} for text in texts)))
    return path


def test_rows_without_text_are_counted_alike(rows_without_text: Path) -> None:
    texts, tally = read(rows_without_text)
    assert texts == ["a", "b"]
    assert (tally.num_records, tally.num_without_text, tally.num_bad) == (4, 2, 0)
    assert tally.notes("d") == ["d: 2 of 4 rows have no text: left out"]


def test_an_absent_field_is_a_null_one(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines({"id": 7}, {"text": "a"}, {"meta": None}))
    texts, tally = read(tmp_path / "d.jsonl")
    assert (texts, tally.num_without_text) == (["a"], 2)


def test_a_field_that_is_absent_is_reported_before_the_end(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines(*[{"id": 7}] * 1500))
    assert "has no field 'text' in its first 1000 lines" in refusal(tmp_path).detail


BAD_LINES = (
    b'{"text": "a"}\n{"text": "b\nnull\n{"text": 5}\n\n{"text": "\xff"}\n{"text": "c"}\n'
)


def test_one_message_names_the_first_bad_lines_and_their_number(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(BAD_LINES)
    error = refusal(tmp_path / "d.jsonl")
    assert (error.code, error.field) == ("bad_line", "path")
    assert error.detail.startswith("4 of 6 rows cannot be read: ")
    assert [f"d.jsonl:{number} " in error.detail for number in (1, 2, 3)] == [
        False,
        True,
        True,
    ]
    assert "d.jsonl:4: field 'text' is a number, not text; ...; correct" in error.detail
    assert error.detail.endswith("or set max_bad_records to 4 to leave them out")


def test_bad_lines_are_left_out_up_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(BAD_LINES)
    texts, tally = read(tmp_path / "d.jsonl", max_bad_records=4)
    assert texts == ["a", "c"]
    (note,) = tally.notes("d")
    assert note.startswith("d: 4 of 6 rows cannot be read, left out: ")
    error = refusal(tmp_path / "d.jsonl", max_bad_records=3)
    assert "4 of 6 rows cannot be read, more than max_bad_records (3): " in error.detail


def test_reading_ends_after_many_bad_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_MAX_COUNTED", 10)
    (tmp_path / "d.jsonl").write_bytes(b"no\n" * 100)
    assert "11 of the first 11 rows cannot be read" in refusal(tmp_path / "d.jsonl").detail


def test_text_that_is_not_utf8_is_a_bad_record_in_every_format(tmp_path: Path) -> None:
    bad = b"gr\xfcn"
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "' + bad + b'"}\n' + lines({"text": "a"}))
    column = pa.array([bad, b"b"], pa.binary())
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "d.parquet")
    (tmp_path / "d.txt").write_bytes(b"x" * (1 << 20) + bad)
    (tmp_path / "e.txt").write_text("e")
    texts, tally = read(tmp_path, max_bad_records=3)
    assert texts == ["a", "b", "e"]
    assert (tally.num_records, tally.num_bad) == (6, 3)
    detail = refusal(tmp_path).detail
    assert "3 of 6 rows cannot be read: " in detail
    assert "d.parquet, row 1 is not UTF-8" in detail
    assert "d.txt is not UTF-8 text (byte 0xfc)" in detail


def test_a_tally_is_the_same_after_json() -> None:
    tally = RecordTally(2, 9)
    tally.add_bad(records.BadRecord("d:1 is not JSON", "correct the line"))
    assert records.tally_of_json(json.loads(json.dumps(tally.to_json()))) == tally


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{MARK}one", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        f'{MARK}{{"text": "{MARK}two"}}\n{MARK}{{"text": "three"}}\n{MARK}\n',
        encoding="utf-8",
    )
    pq.write_table(pa.table({"text": [f"{MARK}four", MARK]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(MARK, encoding="utf-8")
    (tmp_path / "e.txt.gz").write_bytes(
        gzip.compress(f"{MARK}five{MARK}".encode(), mtime=0)
    )
    texts, tally = read(tmp_path)
    # Within a text it is a character.
    assert texts == ["one", "two", "three", "four", f"five{MARK}"]
    assert tally.num_without_text == 2


def test_utf16_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n', encoding="utf-16")
    assert refusal(tmp_path / "d.jsonl").detail.endswith(
        "d.jsonl is UTF-16 text; convert it to UTF-8"
    )


TEXTS = pa.array(["a", None, "b"])


@pytest.mark.parametrize(
    "column",
    [
        TEXTS.dictionary_encode(),
        TEXTS.cast(pa.large_string()).dictionary_encode(),
        TEXTS.cast(pa.large_string()),
        TEXTS.cast(pa.string_view()),
        TEXTS.cast(pa.binary()),
        TEXTS.cast(pa.large_binary()),
        TEXTS.cast(pa.binary_view()),
        pa.ExtensionArray.from_storage(pa.json_(), TEXTS),
    ],
    ids=lambda column: str(column.type)[:30],
)
def test_every_type_whose_values_are_text_is_text(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "text": column}), tmp_path / "d.parquet")
    texts, tally = read(tmp_path / "d.parquet")
    assert (texts, tally.num_without_text) == (["a", "b"], 1)


def test_a_column_of_nulls_alone_has_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(parquet("b"))
    texts, tally = read(tmp_path)
    assert (texts, tally.num_without_text) == (["b"], 2)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    column = pa.array(["a"])
    table = pa.Table.from_arrays([column, column], names=["text", "text"])
    pq.write_table(table, tmp_path / "d.parquet")
    detail = refusal(tmp_path / "d.parquet").detail
    assert detail.endswith("d.parquet has several columns 'text'; rename the others")


NESTED = [
    {"id": 1, "a.b": "dot", "meta": {"body": "one", "c.d": "in", "deep": {"x": "deeper"}}},
    {"id": 2, "a.b": None, "meta": {"body": None, "c.d": "side", "deep": None}},
    {"id": 3, "a.b": "end", "meta": None},
]


@pytest.mark.parametrize(
    ("text_key", "texts"),
    [
        ("a.b", ["dot", "end"]),
        ("meta.body", ["one"]),
        ("meta.c.d", ["in", "side"]),
        ("meta.deep.x", ["deeper"]),
    ],
)
def test_text_inside_objects_is_named_by_a_dotted_key(
    tmp_path: Path, text_key: str, texts: list[str]
) -> None:
    pq.write_table(pa.Table.from_pylist(NESTED), tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_bytes(lines(*NESTED))
    for name in ("d.parquet", "d.jsonl"):
        read_texts, tally = read(tmp_path / name, text_key=text_key)
        assert read_texts == texts
        assert tally.num_without_text == 3 - len(texts)


@pytest.mark.parametrize(
    ("text_key", "message"),
    [
        ("id", "column 'id' is int64, not text; set text_key to a text column"),
        ("meta", r"column 'meta' is struct<.*, not text; set text_key to a text column"),
        ("ids", "not text; the data are already tokenized; write the ids as a .bin/.idx"),
        ("turns", "column 'turns' is list<.*>, not text; set text_key to a text column"),
        ("turns", "or write the parts of each row as one text$"),
        ("meta.none", "has no column 'meta.none'"),
    ],
)
def test_columns_that_are_no_text_are_refused_with_those_that_are(
    tmp_path: Path, text_key: str, message: str
) -> None:
    row = {"id": 1, "ids": [1, 2], "turns": ["a"], "meta": {"body": "x", "n": 2}, "t": "y"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "d.parquet", text_key=text_key)
    assert caught.value.field == "text_key"
    assert "(columns of text: meta.body, t)" in caught.value.detail


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ([1, 2, 3], "the data are already tokenized; write the ids as a .bin/.idx pair"),
        ({"body": "x"}, "set text_key to a field in it, such as text.body"),
        (["x"], "set text_key to a field with text"),
        ([{"role": "user"}], "write the parts of each row as one text, or set text_key"),
    ],
)
def test_fields_that_are_no_text_are_refused_with_a_remedy(
    tmp_path: Path, value: Any, remedy: str
) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines({"text": value}, {"text": value}))
    error = refusal(tmp_path / "d.jsonl")
    assert (error.field, remedy in error.detail) == ("text_key", True)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_pointers_in_place_of_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )
    detail = refusal(tmp_path / name).detail
    assert detail.endswith(
        f"{name} is a pointer of Git LFS, not the data; run git lfs pull"
    )
