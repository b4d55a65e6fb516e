"""Storage: the same behaviour on a local path and on a pyarrow filesystem, atomic
writes, errors that name the path.
"""

import pickle
from pathlib import Path

import pytest
from pyarrow import ArrowInvalid, fs

from megatron_ray.storage.errors import (
    AccessDeniedError,
    DiskFullError,
    InvalidLocationError,
    MissingFileError,
    StorageError,
    storage_errors,
)
from megatron_ray.storage.location import parse_location
from megatron_ray.storage.storage import (
    Entry,
    LocalStorage,
    ObjectStorage,
    Storage,
    open_storage,
)


@pytest.fixture(params=["local", "pyarrow"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "root"))
    return ObjectStorage(
        f"mock://{tmp_path}/root", fs.LocalFileSystem(), f"{tmp_path}/root"
    )


def test_bytes_come_back_and_overwriting_replaces(storage: Storage) -> None:
    storage.write_bytes_atomic("a/b.bin", b"one")
    storage.write_bytes_atomic("a/b.bin", b"three")
    assert storage.read_bytes("a/b.bin") == b"three"
    assert storage.exists("a/b.bin")
    assert storage.exists("a")
    assert not storage.exists("a/c")


def test_listing_is_sorted_relative_and_empty_for_a_missing_folder(
    storage: Storage,
) -> None:
    storage.write_bytes_atomic("x/two", b"22")
    storage.write_bytes_atomic("x/one/deep", b"1")
    assert storage.list("x") == [Entry("one", True, 0), Entry("two", False, 2)]
    assert storage.list("x", recursive=True) == [
        Entry("one", True, 0),
        Entry("one/deep", False, 1),
        Entry("two", False, 2),
    ]
    assert [entry.name for entry in storage.list()] == ["x"]
    assert storage.list("nowhere") == []


def test_deleting_what_is_not_there_is_fine(storage: Storage) -> None:
    storage.write_bytes_atomic("t/file", b"1")
    storage.delete_file("t/other")
    storage.delete_tree("u")
    storage.delete_file("t/file")
    assert not storage.exists("t/file")
    storage.delete_tree("t")
    assert not storage.exists("t")


def test_streams_write_buffers_and_read_ranges(storage: Storage) -> None:
    with storage.open_output("stream.bin") as out:
        out.write(b"0123")
        out.write(memoryview(b"456789"))
    buffer = bytearray(4)
    with storage.open_input("stream.bin") as file:
        file.read_into(3, memoryview(buffer))
        assert bytes(buffer) == b"3456"
        with pytest.raises(
            StorageError,
            match=r"cannot read .*stream\.bin: the (file|object) ends at byte 10, .*too early",
        ):
            file.read_into(8, memoryview(buffer))


def test_missing_file_is_its_own_error_and_names_the_path(storage: Storage) -> None:
    with pytest.raises(
        MissingFileError, match=r"cannot read .*/root/none: no such file or folder"
    ):
        storage.read_bytes("none")
    with (
        pytest.raises(MissingFileError, match=r"cannot read .*/root/none"),
        storage.open_input("none"),
    ):
        pass


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../up"])
def test_names_never_leave_the_root(storage: Storage, name: str) -> None:
    with pytest.raises(StorageError, match="a name inside the storage root is needed"):
        storage.delete_tree(name)


def test_a_failed_local_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write_bytes_atomic("file", b"old")

    def fail() -> None:
        with storage.open_output("file") as out:
            out.write(b"new")
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        fail()
    assert storage.read_bytes("file") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_unfinished_writes_are_not_listed(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with storage.open_output("file") as out:
        out.write(b"x")
        assert storage.list() == []
    assert [entry.name for entry in storage.list()] == ["file"]


def test_an_unwritable_place_names_path_and_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        StorageError, match=r"cannot write .*/file/below/x: Not a directory"
    ):
        open_storage(str(tmp_path / "file")).write_bytes_atomic("below/x", b"")


def test_file_uris_are_local_paths(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/with%20space")
    assert isinstance(storage, LocalStorage)
    assert storage.root == f"{tmp_path}/with space"
    with pytest.raises(StorageError, match="a file URI has three slashes"):
        open_storage("file://host/share")


def test_unknown_schemes_and_broken_uris_are_refused() -> None:
    with pytest.raises(
        StorageError,
        match=r"cannot open ftp://x/y: unknown scheme 'ftp'; use a local path or one of file://, s3://",
    ):
        open_storage("ftp://x/y")
    with pytest.raises(StorageError, match=r"cannot open s3://: the URI names no bucket"):
        open_storage("s3://")


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(MissingFileError("read", "p", "gone")))
    assert isinstance(error, MissingFileError)
    assert error.path == "p"
    assert str(error) == "cannot read p: gone"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError(2, "gone"), MissingFileError),
        (PermissionError(13, "denied"), AccessDeniedError),
        (OSError(28, "No space left on device"), DiskFullError),
        (OSError(5, "Input/output error"), StorageError),
        (ArrowInvalid("bad"), StorageError),
    ],
)
def test_errors_are_translated_once_and_stay_errors_of_their_kind(
    error: Exception, kind: type[StorageError]
) -> None:
    with (
        pytest.raises(StorageError) as caught,
        storage_errors("read", "outer"),
        storage_errors("read", "inner"),
    ):
        raise error
    assert type(caught.value) is kind
    assert caught.value.path == "inner"
    assert isinstance(caught.value, OSError)
    if isinstance(error, OSError):
        assert isinstance(caught.value, type(error))


def test_locations_and_storage_understand_the_same_paths(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/a b", f"file://{tmp_path}/a%20b", "~/a"):
        assert open_storage(path).root == parse_location(path).path
    for path in ("file://", "a\0b", "file://host/share", "s3://"):
        with pytest.raises(InvalidLocationError):
            open_storage(path)
    for path in ("file://", "a\0b", "file://host/share", "nowhere://x"):
        with pytest.raises(InvalidLocationError):
            parse_location(path)
