"""Report and log files: numbers, cursors, torn lines, segments, caps."""

import json
import math
import os
import random
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from workers.rank import spool as spool_module
from workers.rank.log_file import LogFile
from workers.rank.spool import Spool, SpoolReader, parse_line, segments


def numbers(path: Path, after: int = 0, limit: int = 2000) -> list[int]:
    return [line.n for line in SpoolReader(path).read(after, limit)]


def test_lines_are_numbered_and_read_from_a_cursor(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "deep" / "r.jsonl", attempt=2)
    assert [spool.append("step", {"step": n}) for n in range(1, 6)] == [1, 2, 3, 4, 5]
    reader = SpoolReader(spool.path)
    first = reader.read(0, limit=2)
    assert [line.n for line in first] == [1, 2]
    assert [line.n for line in reader.read(2)] == [3, 4, 5]
    spool.append("eval", {"step": 5})
    (line,) = reader.read(5)
    assert line.kind == "eval"
    value = line.value()
    assert {key: value[key] for key in ("n", "kind", "attempt", "data")} == {
        "n": 6,
        "kind": "eval",
        "attempt": 2,
        "data": {"step": 5},
    }
    assert reader.read(6) == []
    assert [line.n for line in reader.read(3)] == [4, 5, 6], "a cursor may go back"


def test_numbers_go_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    spool = Spool(path, 1)
    spool.append("step", {})
    spool.close()
    with open(path, "ab") as file:
        file.write(b'{"n":2,"kind":"st')
    assert numbers(path) == [1]
    again = Spool(path, 1)
    assert again.append("step", {}) == 2
    assert numbers(path) == [1, 2]
    with pytest.raises(OSError, match="descriptor"):
        spool.append("step", {})


def test_garbage_in_the_middle_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(
        b'{"n":1,"kind":"a"}\n{"n":2,"ki{"n":2,"kind":"b"}\n[]\n{"n":2,"kind":"c"}\n'
    )
    assert [(line.n, line.kind) for line in SpoolReader(path).read(0)] == [
        (1, "a"),
        (2, "c"),
    ]
    assert parse_line(b"null\n") is None


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "r.jsonl", 1)
    spool.append(
        "step",
        {
            "loss": float("nan"),
            "split_s": {"a": float("inf"), "b": 1.0},
            "list": [float("-inf"), 2],
        },
    )
    (line,) = SpoolReader(spool.path).read(0)
    assert line.value()["data"] == {
        "loss": None,
        "split_s": {"a": None, "b": 1.0},
        "list": [None, 2],
    }


def test_every_number_comes_back_exactly(tmp_path: Path) -> None:
    rng = random.Random(7)
    floats = [
        value
        for value in (struct.unpack("d", rng.randbytes(8))[0] for _ in range(2000))
        if math.isfinite(value)
    ]
    data = {
        "floats": [*floats, 0.1, 1e16, 5e-324, -0.0, np.float64(1 / 3)],
        "whole": [0, -1, 2**63, 10**25],
    }
    spool = Spool(tmp_path / "r.jsonl", 1)
    spool.append("step", data)
    (line,) = SpoolReader(spool.path).read(0)
    assert line.value()["data"] == data
    assert [math.copysign(1, value) for value in line.value()["data"]["floats"]][-2] == -1


def test_any_text_is_one_line(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "r.jsonl", 1)
    texts = [
        "two\nlines\r\n",
        "\u2028 \x85 \x00",
        'quotes " and \\',
        "ä 漢 \U0001f600",
        "half a character: \udc80",
    ]
    for text in texts:
        spool.append("failed", {"message": text, text: [text]})
    read = [line.value()["data"] for line in SpoolReader(spool.path).read(0)]
    assert [data["message"] for data in read] == [*texts[:-1], "half a character: \\udc80"]
    assert [data[data["message"]] for data in read] == [[data["message"]] for data in read]


def test_segments_are_followed_and_released(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    spool = Spool(path, 1, segment_bytes=300)
    reader = SpoolReader(path)
    seen: list[int] = []
    for n in range(1, 41):
        spool.append("step", {"step": n})
        seen += [line.n for line in reader.read(seen[-1] if seen else 0)]
    assert seen == list(range(1, 41))
    assert len(segments(path)) > 5
    spool.release(20)
    left = numbers(path)
    assert left[0] <= 21
    assert left == list(range(left[0], 41))
    assert numbers(path, after=25) == list(range(26, 41))
    again = Spool(path, 1, segment_bytes=300)
    assert again.append("step", {}) == 41
    spool.release(1000)
    assert segments(path), "the segment being written stays"


def test_a_read_is_bounded_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    spool = Spool(path, 1, segment_bytes=1500)
    for _ in range(9):
        spool.append("monitors", {"text": "x" * 500})
    monkeypatch.setattr(spool_module, "READ_BYTES", 1000)
    reader = SpoolReader(path)
    assert len(segments(path)) == 4
    pages = [[line.n for line in reader.read(after)] for after in (0, 2, 4, 6, 8)]
    assert pages == [[1, 2], [3, 4], [5, 6], [7, 8], [9]]


def test_two_threads_write_whole_lines(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "r.jsonl", 1, segment_bytes=5000)

    def write() -> None:
        for n in range(200):
            spool.append("step", {"step": n})

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(spool.path) == list(range(1, 401))


def test_a_single_file_for_torchrun(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "out.jsonl", 1, segment_bytes=None)
    for n in range(1000):
        spool.append("step", {"step": n, "pad": "x" * 100})
    assert [path for _, path in segments(spool.path)] == [spool.path]
    assert len([json.loads(line) for line in spool.path.read_text().splitlines()]) == 1000


def test_a_report_costs_microseconds(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "r.jsonl", 1)
    data = {
        "step": 1,
        "loss": 1.0,
        "lr": 1e-3,
        "split_s": {"data": 0.1, "forward": 0.2},
    }
    times = []
    for _ in range(2000):
        started = time.perf_counter()
        spool.append("step", data)
        times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 4] < 1e-3, (
        "orders of magnitude only: the machine may be busy"
    )


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "r.jsonl", 1)
    spool.append("step", {})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
    with pytest.raises(OSError, match=r"only 10 of .* the disk is full"):
        spool.append("step", {})

    def refuse(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*/r.jsonl'"):
        spool.append("step", {})
    monkeypatch.undo()
    assert spool.append("step", {}) == 2
    assert numbers(spool.path) == [1, 2]


def test_log_takes_python_and_native_output(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from workers.rank.log_file import LogFile
log = LogFile(Path(sys.argv[1]))
log.capture()
print("from python")
os.write(1, b"from below\\n")
os.system("echo from a child >&2")
os.abort()
"""
    path = tmp_path / "rank.log"
    subprocess.run(
        [sys.executable, "-c", program, str(path)], check=False, capture_output=True
    )
    text = path.read_text()
    assert "from python\nfrom below\nfrom a child\n" in text


def test_log_offsets_count_all_bytes_when_it_is_emptied(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "rank.log", cap_bytes=100)
    file = os.open(log.path, os.O_WRONLY | os.O_APPEND)
    os.write(file, b"a" * 80)
    assert log.read(0, 50) == (0, b"a" * 50)
    assert log.read(50, 50) == (50, b"a" * 30)
    os.write(file, b"b" * 80)
    assert log.read(80, 0) == (80, b"")
    start, data = log.read(80, 1000)
    assert start == 160, "what was not read in time is lost, and the offset says so"
    assert data.startswith(b"[log emptied after 160 bytes")
    os.write(file, b"c\n")
    assert log.read(start + len(data), 10) == (start + len(data), b"c\n")
    os.close(file)
    log.close()
