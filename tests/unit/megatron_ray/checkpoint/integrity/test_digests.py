"""Other bytes than were written are detected in every read, whatever its range."""

import json
import random
from pathlib import Path

import pytest

from megatron_ray.checkpoint.directory import DamagedCheckpointError, commit
from megatron_ray.checkpoint.integrity.digests import (
    BLOCK_BYTES,
    CheckedFiles,
    DigestedFiles,
    verify_share,
)
from megatron_ray.storage.storage import LocalStorage

DATA = "data/rank-00000.bin"
STATE = "train_state/rank-00000.json"
SIZE = 3 * BLOCK_BYTES + 1000
NAMES = (DATA, STATE, "digests/rank-00000.json")


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def storage(tmp_path: Path, content: bytes) -> LocalStorage:
    storage = LocalStorage(str(tmp_path))
    files = DigestedFiles(storage)
    with files.open_output(DATA) as file:
        # Writes of any size: blocks begin and end within them.
        for start in range(0, SIZE, 700_001):
            file.write(content[start : start + 700_001])
    files.write_bytes_atomic(STATE, b'{"rng": 1}')
    files.write_bytes_atomic("notes.txt", b"for people")
    files.write_bytes_atomic("index.json", b'{"files": {}}')
    files.write_digests(0)
    commit(storage.root, {}, [])
    return storage


def checked(storage: LocalStorage) -> CheckedFiles:
    return CheckedFiles(storage, storage.root, NAMES)


RANGES = [
    (0, SIZE),
    (0, 10),
    (BLOCK_BYTES, BLOCK_BYTES),
    (BLOCK_BYTES - 5, 10),
    (17, 3 * BLOCK_BYTES),
    (3 * BLOCK_BYTES + 1, 999),
    (2 * BLOCK_BYTES, SIZE - 2 * BLOCK_BYTES),
]


def test_any_range_is_read_as_it_was_written(storage: LocalStorage, content: bytes) -> None:
    with checked(storage).open_input(DATA) as source:
        for start, length in RANGES:
            buffer = bytearray(length)
            source.read_into(start, memoryview(buffer))
            assert buffer == content[start : start + length]
        with pytest.raises(DamagedCheckpointError, match=f"ends at byte {SIZE}"):
            source.read_into(SIZE - 1, memoryview(bytearray(2)))
    assert checked(storage).read_bytes(STATE) == b'{"rng": 1}'
    assert verify_share(storage.root, 0, 1) is None


def zero(path: Path, start: int, count: int = 400) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(count))


@pytest.mark.parametrize("start", [0, BLOCK_BYTES + 3, SIZE - 400])
def test_zeros_in_place_of_bytes_are_detected_where_they_are_read(
    storage: LocalStorage, tmp_path: Path, content: bytes, start: int
) -> None:
    zero(tmp_path / DATA, start)
    block = start // BLOCK_BYTES
    with checked(storage).open_input(DATA) as source:
        with pytest.raises(DamagedCheckpointError, match=r"has other bytes than were"):
            source.read_into(0, memoryview(bytearray(SIZE)))
        with pytest.raises(DamagedCheckpointError, match=r"has other bytes than were"):
            source.read_into(block * BLOCK_BYTES + 900, memoryview(bytearray(1)))
        # Undamaged blocks stay readable.
        buffer = bytearray(10)
        other = (block + 1) % 3 * BLOCK_BYTES
        source.read_into(other, memoryview(buffer))
        assert buffer == content[other : other + 10]
    end = min((block + 1) * BLOCK_BYTES, SIZE)
    assert verify_share(storage.root, 0, 1) == (
        f"its file {DATA} has other bytes than were written, between byte "
        f"{block * BLOCK_BYTES} and {end}"
    )


def test_small_files_and_the_digests_themselves_are_checked(
    storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / STATE).write_bytes(b'{"rng": 2}')
    with pytest.raises(DamagedCheckpointError, match=f"its file {STATE}: it has other"):
        checked(storage).read_bytes(STATE)
    assert "has other bytes" in (verify_share(storage.root, 0, 1) or "")
    zero(tmp_path / "digests" / "rank-00000.json", 0, 20)
    with pytest.raises(DamagedCheckpointError, match=r"digests/rank-00000.json: it is not"):
        checked(storage).read_bytes(STATE)


def test_checkpoints_without_digests_and_files_for_people_are_not_checked(
    storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_bytes(b"edited by people")
    assert checked(storage).read_bytes("notes.txt") == b"edited by people"
    zero(tmp_path / DATA, 0)
    old = CheckedFiles(storage, storage.root, (DATA, STATE))
    with old.open_input(DATA) as source:
        source.read_into(0, memoryview(bytearray(SIZE)))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["files"]["digests/rank-00000.json"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert verify_share(storage.root, 0, 1) is None


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    for rank in (0, 1):
        files = DigestedFiles(storage)
        files.write_bytes_atomic(f"train_state/rank-0000{rank}.json", b"{}")
        files.write_bytes_atomic("index.json", b'{"files": {}}')
        files.write_digests(rank)
    commit(str(tmp_path), {}, [])
    (tmp_path / "train_state" / "rank-00001.json").write_bytes(b"[]")
    assert verify_share(storage.root, 0, 2) is None
    assert "rank-00001.json" in (verify_share(storage.root, 1, 2) or "")
    assert verify_share(storage.root, 2, 3) is None
    (tmp_path / "index.json").unlink()
    assert verify_share(storage.root, 0, 2) == "its file index.json is missing"
