"""The .bin/.idx format, against files that megatron-core wrote."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ray.data.indexed import (
    IndexedDataset,
    IndexedDatasetBuilder,
    IndexTable,
    token_dtype,
    write_index,
)

GOLDEN = json.loads(
    (Path(__file__).parents[3] / "golden" / "megatron_data.json").read_text()
)["indexed"]


def build(prefix: Path, documents: list[list[list[int]]], dtype: Any) -> IndexedDataset:
    with IndexedDatasetBuilder(prefix, np.dtype(dtype)) as builder:
        for document in documents:
            for sequence in document:
                builder.add(sequence)
                builder.end_sequence()
            builder.end_document()
    return IndexedDataset(str(prefix))


@pytest.mark.parametrize(("name", "dtype"), [("u16", np.uint16), ("i32", np.int32)])
def test_builder_writes_the_same_bytes_as_megatron_core(
    tmp_path: Path, name: str, dtype: Any
) -> None:
    corpus = build(tmp_path / name, GOLDEN["documents"], dtype)
    expected = GOLDEN[name]
    assert (
        hashlib.sha256((tmp_path / f"{name}.bin").read_bytes()).hexdigest()
        == expected["bin_sha256"]
    )
    assert (tmp_path / f"{name}.idx").read_bytes() == base64.b64decode(
        expected["idx_base64"]
    )
    assert (
        hashlib.sha256((tmp_path / f"{name}.idx").read_bytes()).hexdigest()
        == expected["idx_sha256"]
    )
    assert corpus.lengths.tolist() == expected["sequence_lengths"]
    assert corpus.table.documents.tolist() == expected["document_indices"]
    assert corpus.num_documents == len(GOLDEN["documents"])
    assert corpus.num_tokens == sum(expected["sequence_lengths"])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 65000), max_size=9), max_size=3), max_size=6
    )
)
def test_round_trip(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    corpus = build(tmp_path / "c", documents, np.uint16)
    assert [corpus[i].tolist() for i in range(len(corpus))] == [
        sequence for document in documents for sequence in document
    ]
    assert corpus.num_documents == len(documents)


def test_file_uri_and_ranges(tmp_path: Path) -> None:
    build(tmp_path / "c", [[[1, 2, 3, 4, 5]]], np.int32)
    corpus = IndexedDataset(f"file://{tmp_path}/c")
    assert corpus.get(0, 1, 3).tolist() == [2, 3, 4]
    assert corpus.get(0, 3).tolist() == [4, 5]
    with pytest.raises(IndexError, match=r"tokens 3\.\.6 of sequence 0, which has 5"):
        corpus.get(0, 3, 3)


def test_ranges_through_a_filesystem_without_mapping(tmp_path: Path) -> None:
    build(tmp_path / "c", [[[1, 2, 3, 4, 5]], [[6, 7]]], np.int32)
    corpus = IndexedDataset(str(tmp_path / "c"))
    corpus._map = None
    corpus._file = (
        __import__("pyarrow.fs")
        .fs.LocalFileSystem()
        .open_input_file(str(tmp_path / "c.bin"))
    )
    assert corpus.get(0, 1, 3).tolist() == [2, 3, 4]
    assert corpus[1].tolist() == [6, 7]


def test_a_document_added_in_pieces_is_one_sequence(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "c", np.dtype(np.uint16)) as builder:
        builder.add([1, 2])
        builder.add([])
        builder.add([3])
        builder.end_document()
    assert [sequence.tolist() for sequence in [IndexedDataset(str(tmp_path / "c"))[0]]] == [
        [1, 2, 3]
    ]


def test_an_index_may_select_from_a_shared_bin(tmp_path: Path) -> None:
    corpus = build(tmp_path / "c", [[[1, 2, 3]], [[4, 5]], [[6]]], np.uint16)
    chosen = np.array([2, 0])
    table = IndexTable(
        corpus.table.dtype,
        corpus.lengths[chosen],
        corpus.table.pointers[chosen],
        np.arange(3),
    )
    write_index(tmp_path / "part.idx", table)
    (tmp_path / "part.bin").symlink_to("c.bin")
    part = IndexedDataset(str(tmp_path / "part"))
    assert [part[i].tolist() for i in range(2)] == [[6], [1, 2, 3]]


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(tmp_path / "c", np.dtype(np.uint16))
    with pytest.raises(OverflowError, match="token 65536 does not fit into uint16"):
        builder.add([65536])
    builder.close()


def test_a_build_that_fails_leaves_no_index(tmp_path: Path) -> None:
    def fail() -> None:
        with IndexedDatasetBuilder(tmp_path / "c", np.dtype(np.uint16)) as builder:
            builder.add([1])
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        fail()
    assert not (tmp_path / "c.idx").exists()


def test_dtype_rule() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is not a Megatron index: it does not start with MMIDIDX"),
        (
            b"MMIDIDX\0\0" + (2).to_bytes(8, "little") + b"\x08" + bytes(16),
            "of version 2; only version 1",
        ),
        (
            b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x09" + bytes(16),
            "unknown token type 9; known are",
        ),
        (
            b"MMIDIDX\0\0"
            + (1).to_bytes(8, "little")
            + b"\x08"
            + (3).to_bytes(8, "little")
            + bytes(8),
            "is cut short: 34 bytes where 3",
        ),
    ],
)
def test_broken_index(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.idx").write_bytes(content)
    (tmp_path / "c.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        IndexedDataset(str(tmp_path / "c"))


def test_missing_and_short_bin(tmp_path: Path) -> None:
    build(tmp_path / "c", [[[1, 2, 3]]], np.uint16)
    (tmp_path / "c.bin").write_bytes(b"12")
    with pytest.raises(
        ValueError, match=r"c.bin is cut short: 2 bytes where its index needs 6"
    ):
        IndexedDataset(str(tmp_path / "c"))
    (tmp_path / "c.bin").unlink()
    with pytest.raises(FileNotFoundError):
        IndexedDataset(str(tmp_path / "c"))
