"""Everything that is damaged in a checkpoint is listed, with the tensors it belongs to."""

import json
import random
from pathlib import Path

import pytest

from megatron_ray.checkpoint.directory import (
    CheckpointError,
    DamagedCheckpointError,
    commit,
)
from megatron_ray.checkpoint.integrity.__main__ import main
from megatron_ray.checkpoint.integrity.digests import BLOCK_BYTES, DigestedFiles
from megatron_ray.checkpoint.integrity.tensor_ranges import TensorRanges
from megatron_ray.checkpoint.integrity.verification import verify_checkpoint
from megatron_ray.storage.storage import LocalStorage

SIZE = 2 * BLOCK_BYTES + 500
DATA = ("data/rank-00000.bin", "data/rank-00001.bin")
INDEX = {
    "format_version": 1,
    "files": dict.fromkeys(DATA, SIZE),
    "tensors": {
        "model/first": {"chunks": [[[0], [9], 0, 0], [[9], [9], 1, 0]]},
        "model/second": {"chunks": [[[0], [9], 0, 64]]},
        "model/third": {"chunks": [[[0], [9], 0, BLOCK_BYTES]]},
        "model/fourth": {"chunks": [[[0], [9], 0, BLOCK_BYTES + 64]]},
        "model/last": {"chunks": [[[0], [9], 1, BLOCK_BYTES + 700]]},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A committed checkpoint of two ranks."""
    storage = LocalStorage(str(tmp_path))
    for rank in (1, 0):
        files = DigestedFiles(storage)
        with files.open_output(DATA[rank]) as file:
            file.write(random.Random(rank).randbytes(SIZE))
        files.write_bytes_atomic(f"train_state/rank-0000{rank}.json", b"{}")
        if rank == 0:
            files.write_bytes_atomic("index.json", json.dumps(INDEX).encode())
            files.write_bytes_atomic("spec.yaml", b"for people")
        files.write_digests(rank)
    commit(str(tmp_path), {}, [])
    return tmp_path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_has_no_damage(folder: Path) -> None:
    (folder / "spec.yaml").write_bytes(b"edited by people")
    result = verify_checkpoint(str(folder))
    assert result.damage == ()
    assert result.unchecked == ()
    assert result.files == 7
    assert result.bytes > 2 * SIZE


def test_every_flipped_byte_is_named_by_file_and_tensor(folder: Path) -> None:
    flip(folder / DATA[0], 70)
    flip(folder / DATA[0], SIZE - 1)
    flip(folder / DATA[1], BLOCK_BYTES)
    other = "has other bytes than were written, between byte"
    assert verify_checkpoint(str(folder)).damage == (
        f"file {DATA[0]} {other} 0 and {BLOCK_BYTES}, in model/first, model/second",
        f"file {DATA[0]} {other} {2 * BLOCK_BYTES} and {SIZE}, in model/fourth",
        f"file {DATA[1]} {other} {BLOCK_BYTES} and {2 * BLOCK_BYTES}, in model/first, "
        "model/last",
    )


def test_all_other_damage_is_listed_too(folder: Path) -> None:
    (folder / DATA[1]).unlink()
    (folder / "train_state" / "rank-00000.json").write_bytes(b"[]")
    (folder / "train_state" / "rank-00001.json").write_bytes(b"longer")
    flip(folder / "index.json", 9)
    flip(folder / DATA[0], 0)
    # Without an index tensors have no names.
    assert set(verify_checkpoint(str(folder)).damage) == {
        f"file {DATA[1]} is missing",
        "file train_state/rank-00001.json has 6 bytes, 2 were written",
        "file train_state/rank-00000.json has other bytes than were written, between byte 0 "
        "and 2",
        f"file {DATA[0]} has other bytes than were written, between byte 0 and {BLOCK_BYTES}",
        "file index.json has other bytes than were written, between byte 0 and "
        f"{(folder / 'index.json').stat().st_size}",
    }


def test_files_without_digests_are_not_taken_for_whole(folder: Path) -> None:
    digests = folder / "digests" / "rank-00001.json"
    size = digests.stat().st_size
    digests.write_bytes(b"\0" * size)
    result = verify_checkpoint(str(folder))
    assert result.damage == ("file digests/rank-00001.json: it is not readable",)
    assert result.unchecked == (DATA[1], "train_state/rank-00001.json")
    digests.unlink()
    result = verify_checkpoint(str(folder))
    assert result.damage == ("file digests/rank-00001.json is missing",)
    manifest = json.loads((folder / "manifest.json").read_text())
    for rank in (0, 1):
        del manifest["files"][f"digests/rank-0000{rank}.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = verify_checkpoint(str(folder))
    assert result.damage == ()
    assert len(result.unchecked) == 5


def test_what_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_bytes(b"{")
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json is missing or not"):
        verify_checkpoint(str(folder))
    (folder / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match="it is not committed"):
        verify_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match="there is no checkpoint at this path"):
        verify_checkpoint(str(tmp_path / "elsewhere"))


def test_many_tensors_are_counted() -> None:
    tensors = {
        f"t{number}": {"chunks": [[[0], [1], 0, 64 * number]]} for number in range(9)
    }
    ranges = TensorRanges({"tensors": tensors})
    assert ranges.words(DATA[0], 0, 1000) == ", in t0, t1, t2 and 6 more"
    assert ranges.words(DATA[0], 128, 192) == ", in t2"
    assert ranges.words(DATA[0], 130, 193) == ", in t2, t3"
    assert ranges.words("index.json", 0, 9) == ""


def test_the_command_prints_what_it_knows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        code = main([str(folder), *arguments])
        return code, capsys.readouterr().out

    num_bytes = verify_checkpoint(str(folder)).bytes
    assert run() == (0, f"{folder}: 7 files, {num_bytes} bytes\n")
    flip(folder / DATA[0], 0)
    code, out = run()
    assert code == 1
    assert out.startswith(f"damaged: file {DATA[0]} has other bytes")
    code, out = run("--json")
    assert code == 0
    assert json.loads(out)["damage"] == list(verify_checkpoint(str(folder)).damage)
    assert main([str(folder / "elsewhere")]) == 1
    error = (
        f"error: cannot load {folder / 'elsewhere'}: there is no checkpoint at this path\n"
    )
    assert capsys.readouterr().err == error
