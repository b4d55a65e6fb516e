"""No file is trained on and held out at once, however the sources name it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.config.data import DataConfig, DataSource
from megatron_ray.data.preparation.data_files import DataFiles, SourceAt, find_data
from tests.support.corpus_files import BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}')
    return tmp_path


def find(
    folder: Path,
    train: list[str],
    validation: list[str] | None = None,
    fraction: float = 0.1,
) -> DataFiles:
    def sources(names: list[str] | None) -> tuple[DataSource, ...]:
        return tuple(DataSource(path=str(folder / name)) for name in names or ())

    return find_data(
        DataConfig(
            train=sources(train),
            validation=sources(validation),
            validation_fraction=fraction,
            tokenizer=BYTES,
        )
    )


def stems(sources_at: list[SourceAt]) -> list[str]:
    return [
        "".join(Path(file.path).stem for file in source.files) for _, source in sources_at
    ]


@pytest.mark.parametrize(
    ("train", "validation", "trained", "evaluated"),
    [
        (["."], ["a.jsonl"], ["bc"], ["a"]),
        (["*.jsonl"], ["./b.jsonl", "c.jsonl"], ["a"], ["b", "c"]),
        (["a.jsonl"], ["."], ["a"], ["bc"]),
        (["."], ["[ab].jsonl"], ["c"], ["ab"]),
        (["a.jsonl", "."], ["link.jsonl"], ["a", "abc"], ["link"]),
    ],
)
def test_files_of_validation_sources_are_left_out_of_folders(
    folder: Path,
    train: list[str],
    validation: list[str],
    trained: list[str],
    evaluated: list[str],
) -> None:
    if "link.jsonl" in validation:
        (folder / "link.jsonl").symlink_to(folder / "b.jsonl")
        trained = ["a", "ac"]
    data = find(folder, train, validation)
    assert data.problems == []
    assert (stems(data.train), stems(data.validation)) == (trained, evaluated)
    assert any(
        ": not trained on" in note or ": not evaluated" in note for note in data.notes
    )


def test_a_file_named_in_both_lists_is_noted(folder: Path) -> None:
    data = find(folder, ["a.jsonl"], ["a.jsonl"])
    assert (stems(data.train), stems(data.validation)) == (["a"], ["a"])
    assert data.notes == [f"{folder}/a.jsonl is both trained on and evaluated on"]


def test_a_hard_link_is_the_same_file(folder: Path) -> None:
    (folder / "link.jsonl").hardlink_to(folder / "a.jsonl")
    data = find(folder, ["[abc].jsonl"], ["link.jsonl"])
    assert (stems(data.train), stems(data.validation)) == (["bc"], ["link"])
    (note,) = find(folder, ["a.jsonl"], ["link.jsonl"]).notes
    assert note.endswith("a.jsonl is both trained on and evaluated on")


def test_files_that_links_reach_again_are_read_once(folder: Path) -> None:
    (folder / "b2.jsonl").hardlink_to(folder / "b.jsonl")
    (folder / "a2.jsonl").symlink_to("a.jsonl")
    data = find(folder, ["[ab]*.jsonl"])
    assert stems(data.train) == ["ab"]
    assert data.notes == [
        f"{folder}/[ab]*.jsonl: 2 files (a2.jsonl, b2.jsonl) linked to others: read once"
    ]
    (folder / "other").mkdir()
    (folder / "other/again").symlink_to(folder)
    data = find(folder, ["other"])
    assert stems(data.train) == ["abc"]
    assert "2 files (again/a2.jsonl, again/b2.jsonl) linked" in data.notes[0]


def test_links_in_circles_end(folder: Path) -> None:
    # Twice, so that following them would take two to the power of forty steps.
    for name in ("one", "two"):
        (folder / name).symlink_to(folder)
    data = find(folder, ["."])
    assert (stems(data.train), data.notes) == (["abc"], [])
    (folder / "self.jsonl").symlink_to("self.jsonl")
    (problem,) = find(folder, ["."]).problems
    assert "links to data that do not exist: 1 file (self.jsonl)" in problem.detail


def test_a_folder_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed", "lost+found"):
        (folder / name).mkdir()
    scandir = os.scandir

    def deny(path: str) -> Any:
        if path.endswith(("closed", "lost+found")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    (problem,) = find(folder, ["."]).problems
    assert problem.detail.startswith(f"{folder}/closed may not be read by the user")
    (folder / "closed").rmdir()
    # The root of a disk has one that is not part of the data.
    assert stems(find(folder, ["."]).train) == ["abc"]


def test_other_fields_of_the_same_file_are_other_text(folder: Path) -> None:
    other = DataSource(path=str(folder / "a.jsonl"), text_key="title")
    source = DataSource(path=str(folder))
    data = find_data(DataConfig(train=(source,), validation=(other,)))
    assert (stems(data.train), data.notes) == (["abc"], [])


def test_a_folder_in_both_lists_is_refused(folder: Path) -> None:
    data = find(folder, ["."], ["*.jsonl"])
    (problem,) = data.problems
    assert (problem.pointer, problem.code) == ("/data/train/0/path", "shared_files")
    assert "give other files in one of them, or leave data.validation out" in problem.detail


def test_each_file_is_held_out_by_one_source(folder: Path) -> None:
    data = find(folder, ["*.jsonl", "a.jsonl", "[ab].jsonl"])
    assert stems(data.train) == ["bc", "a", "a"]
    assert "1 file (a.jsonl) of /data/train/1: read there only" in data.notes[0]
    # Of equal sources the same documents are held out.
    assert stems(find(folder, [".", "*.jsonl"]).train) == ["abc", "abc"]
    # Without a share to hold out, weights may be set by naming a file twice.
    assert stems(find(folder, [".", "a.jsonl"], fraction=0).train) == ["abc", "a"]


def test_validation_files_beside_training_files_are_evaluated_on(folder: Path) -> None:
    for name in ("set/train.jsonl", "set/valid.jsonl", "set/dev.jsonl"):
        (folder / "set").mkdir(exist_ok=True)
        (folder / name).write_text('{"text": "x"}')
    data = find(folder, ["set", "a.jsonl"])
    assert stems(data.train) == ["train", "a"]
    assert [pointer for pointer, _ in data.validation] == ["/data/train/0"]
    assert stems(data.validation) == ["devvalid"]
    # Files that another source trains on are not evaluated on.
    data = find(folder, ["set", "set/dev.jsonl"])
    assert (stems(data.train), stems(data.validation)) == (["train", "dev"], ["valid"])
    for data in (find(folder, ["set"], fraction=0), find(folder, ["set"], ["a.jsonl"])):
        assert stems(data.train) == ["train"]
        assert any("of validation data: not trained on" in note for note in data.notes)
    assert stems(find(folder, ["set"], fraction=0).validation) == []
