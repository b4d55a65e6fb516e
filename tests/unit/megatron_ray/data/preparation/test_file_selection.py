"""Which files of a folder or pattern are read, by their names."""

import gzip
from pathlib import Path

import pytest

from megatron_ray.config.data import DataSource
from megatron_ray.data.preparation.errors import DataError
from megatron_ray.data.preparation.file_selection import Role, split_of
from megatron_ray.data.preparation.sources import SourceFiles, find_source


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"text": "x"}')
    return folder


def names_of(source: SourceFiles, folder: Path) -> list[str]:
    return [file.path.removeprefix(f"{folder}/") for file in source.files]


def find(path: Path | str, role: Role = "train") -> SourceFiles:
    return find_source(DataSource(path=str(path)), role)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/train_sft-00000-of-00003-a09b74b3ef9c3b56.parquet", "train"),
        ("c4-validation.00000-of-00008.json.gz", "validation"),
        ("wiki.valid.txt", "validation"),
        ("val/x.jsonl", "validation"),
        ("en_dev.txt", "validation"),
        ("devset2.jsonl", "validation"),
        ("eval.jsonl", "validation"),
        ("EVALUATION.jsonl", "validation"),
        ("Test.jsonl", "test"),
        ("my_testset-1.jsonl", "test"),
        ("test_data.txt", "test"),
        ("held-out.txt", "test"),
        ("holdout/a.txt", "test"),
        ("test/train-0.jsonl", "test"),
        ("train/test-0.jsonl", "train"),
        ("tests/a.jsonl", "test"),
        ("testdev.jsonl", "test"),
        ("evals/a.jsonl", "validation"),
        ("validate.txt", "validation"),
        ("myTest.jsonl", "test"),
        ("myTrainSet.jsonl", "train"),
        ("testA.jsonl", "test"),
        ("devB.jsonl", "validation"),
        ("GameDev.txt", None),
        ("LatestNews.txt", None),
        ("latest.jsonl", None),
        ("contest.txt", None),
        ("trains.txt", None),
        ("developers.txt", None),
        ("valley.txt", None),
        ("a/b/part-00000.jsonl", None),
    ],
)
def test_words_of_a_name_mark_a_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


PUBLISHED = (
    "train-0.parquet",
    "validation-0.parquet",
    "test-0.parquet",
    "README.txt",
    "LICENSE.txt",
    "dataset_info.json",
)
FOLDERS = ("train/a.jsonl", "validation/b.jsonl", "test/c.jsonl", "dev/d.txt")


@pytest.mark.parametrize(
    ("names", "read", "validation"),
    [
        (PUBLISHED, ["train-0.parquet"], ["validation-0.parquet"]),
        (FOLDERS, ["train/a.jsonl"], ["dev/d.txt", "validation/b.jsonl"]),
        (("a.jsonl", "b.jsonl", "test.jsonl"), ["a.jsonl", "b.jsonl"], []),
        (("train.txt", "more.txt", "eval.txt"), ["more.txt", "train.txt"], ["eval.txt"]),
    ],
)
def test_held_out_files_of_a_folder_are_not_trained_on(
    tmp_path: Path, names: tuple[str, ...], read: list[str], validation: list[str]
) -> None:
    folder = write_files(tmp_path / "set", *names)
    pattern = f"{folder}/**/*.*"
    for path in (folder, f"{folder}/", pattern):
        source = find(path)
        assert names_of(source, folder) == read
        beside = [Path(file.path).name for file in source.validation_files]
        assert beside == [Path(name).name for name in validation]
        # Each file that is left out is named.
        notes = " ".join(source.notes)
        left_out = set(names) - set(read)
        assert {name for name in left_out if name in notes} == left_out


def test_what_a_folder_is_evaluated_on(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", *PUBLISHED)
    source = find(folder, "validation")
    assert names_of(source, folder) == ["validation-0.parquet"]
    assert source.notes[0].endswith(
        "1 file (train-0.parquet) of training data: not evaluated on"
    )
    # Without validation files, those of the test.
    (folder / "validation-0.parquet").unlink()
    assert names_of(find(folder, "validation"), folder) == ["test-0.parquet"]
    unmarked = write_files(tmp_path / "other", "a.txt", "b.txt")
    assert names_of(find(unmarked, "validation"), unmarked) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("path", ["set/test-*", "set/te*", "set/test-0.jsonl", "set/val"])
def test_held_out_files_are_read_when_they_are_named(tmp_path: Path, path: str) -> None:
    names = ("test-0.jsonl", "train.jsonl", "val/eval-1.jsonl", "val/b.jsonl")
    folder = write_files(tmp_path / "set", *names)
    source = find(tmp_path / path)
    expected = ["test-0.jsonl"]
    if path == "set/val":
        # The folder is named, so its other files are meant.
        expected = ["val/b.jsonl"]
    assert names_of(source, folder) == expected
    (folder / "val/b.jsonl").unlink()
    assert names_of(find(folder / "val"), folder) == ["val/eval-1.jsonl"]


@pytest.mark.parametrize(
    ("role", "name", "use"),
    [
        ("train", "dev.jsonl", "to train on"),
        ("validation", "train.jsonl.gz", "to evaluate"),
    ],
)
def test_a_folder_of_another_split_is_refused_with_a_pattern_that_works(
    tmp_path: Path, role: Role, name: str, use: str
) -> None:
    folder = write_files(tmp_path / "set", name, "README.txt")
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(b'{"text": "x"}'))
    with pytest.raises(DataError, match=use) as caught:
        find(folder, role)
    assert (caught.value.code, name in caught.value.detail) == ("other_split", True)
    pattern = caught.value.detail.split("give a pattern: ")[1]
    assert names_of(find(pattern, role), folder) == [name]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("b.zip", "unpack it"),
        ("b.jsonl.lz4", "unpack it"),
        ("part-0.gz", "unpack it, or name it by what it holds, such as .jsonl.gz"),
        ("b.parquet.gz", "unpack it, or give only"),
        ("b.tar.gz", "unpack it, or give only"),
        ("b.jsonl.gz.gz", "unpack it, or give only"),
        ("b.csv.gz", "convert it to .jsonl or .parquet"),
        ("b.csv", "convert it to .jsonl or .parquet"),
        ("b.arrow.gz", "unpack it"),
        ("b.orc", "convert it to .jsonl or .parquet"),
        ("b.bin", "give the pair as a source of its own"),
    ],
)
def test_data_that_cannot_be_read_are_refused_with_a_remedy(
    tmp_path: Path, name: str, remedy: str
) -> None:
    folder = write_files(tmp_path / "set", "a.jsonl", name)
    with pytest.raises(DataError, match="of a type that cannot be read") as caught:
        find(folder)
    assert name in caught.value.detail
    assert f"of a type that cannot be read; {remedy}" in caught.value.detail
    pattern = caught.value.detail.split("for example ")[1]
    assert names_of(find(pattern), folder) == ["a.jsonl"]


def test_other_files_are_named(tmp_path: Path) -> None:
    names = [f"{number}.md" for number in range(7)]
    folder = write_files(
        tmp_path / "set", "a.jsonl", *names, ".b.jsonl", "_c/d.txt", "_SUCCESS"
    )
    assert [note.removeprefix(f"{folder}: ") for note in find(folder).notes] == [
        "2 files (.b.jsonl, _c/d.txt) with names that begin with . or _: not read",
        "7 files (0.md, 1.md, 2.md, 3.md, 4.md, ...) of other types: not read; convert them "
        "to .txt, .jsonl, .parquet, .arrow to use them",
    ]


def test_caches_of_a_library_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    cache = "cache-1ab2.arrow"
    folder = write_files(tmp_path / "set", "a.jsonl", cache, "dataset_info.json")
    source = find(folder)
    assert names_of(source, folder) == ["a.jsonl"]
    assert f"{folder}: 1 file ({cache}) that a library keeps as its cache: not read" in (
        source.notes
    )
    assert names_of(find(folder / "cache-*.arrow"), folder) == [cache]


def test_hidden_files_that_a_pattern_matches_are_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", "a.jsonl", ".copies/a.jsonl", "_b/a.jsonl")
    source = find(f"{folder}/**/*.jsonl")
    assert len(source.files) == 3
    (note,) = source.notes
    assert note.endswith(": 1 file (.copies/a.jsonl) with names that begin with .: read")


def test_descriptions_of_any_type_are_named_as_such(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", "a.jsonl", "README.md", "LICENSE", "README.txt")
    (note,) = find(folder).notes
    assert note == (
        f"{folder}: 3 files (LICENSE, README.md, README.txt) describing the data: not read"
    )
    with pytest.raises(DataError, match="of a type that cannot be read"):
        find(folder / "LIC*")


def test_a_description_is_read_when_it_is_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", "README.txt", "LICENSE-MIT.txt", "licensed.txt")
    assert names_of(find(folder), folder) == ["licensed.txt"]
    assert names_of(find(folder / "README.txt"), folder) == ["README.txt"]
    assert names_of(find(folder / "READ*"), folder) == ["README.txt"]
    (folder / "licensed.txt").unlink()
    with pytest.raises(DataError, match=r"holds no .txt, .jsonl, .parquet, .arrow file"):
        find(folder)


def test_links_to_missing_data_are_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", "a.jsonl")
    (folder / "notes").symlink_to("nowhere")
    assert names_of(find(folder), folder) == ["a.jsonl"]
    assert find(folder).notes == (f"{folder}: 1 file (notes) linked to nothing: not read",)
    (folder / "b.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(
        DataError, match=r"links to data that do not exist: 1 file \(b.jsonl\);"
    ):
        find(folder)
    with pytest.raises(DataError, match=r"do not exist: 1 file \(b.jsonl\)"):
        find(f"{folder}/*.jsonl")
    assert names_of(find(f"{folder}/a*"), folder) == ["a.jsonl"]


def test_a_file_and_its_compressed_copy_are_read_once(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", "a.jsonl", "a.jsonl.gz", "b.txt.zst", "c.csv.gz")
    (folder / "c.csv.gz").rename(folder / "b.txt.zst.md5")
    for path in (folder, folder / "*"):
        source = find(path)
        assert names_of(source, folder) == ["a.jsonl", "b.txt.zst"]
        note = "1 file (a.jsonl.gz) beside the same file unpacked: not read"
        assert source.notes[0] == f"{path}: {note}"
