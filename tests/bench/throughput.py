"""Tokens per second of one rank and one thread against Hugging Face transformers, eager against eager.

Both run as child processes with the same allocator environment and take turns, so that a noisy machine hits both alike. The first 12
losses must be the reference's, else the comparison would be of different work.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import reference

PAIRS, STEPS_A_TURN = 9, 4
GOALS = {"fp32": 1.1, "bf16": 1.25}
# glibc returns large blocks to the system at once by default; keeping them is worth a fifth of a step to either side.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}


class Contestant:
    """A child process that trains on request."""

    def __init__(self, name: str, precision: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.contestants", name, precision],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def take(self, steps: int) -> dict[str, list[float]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer: dict[str, list[float]] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run() -> Iterator[dict[str, Any]]:
    for precision, goal in GOALS.items():
        yield compare(precision, goal)


def compare(precision: str, goal: float) -> dict[str, Any]:
    """Median of the ratios of the pairs, with quartiles."""
    ours, theirs = Contestant("ours", precision), Contestant("transformers", precision)
    try:
        first, other = ours.take(12), theirs.take(12)
        tokens = reference.GLOBAL_BATCH * reference.SEQUENCE
        pairs = [(_median_rate(ours, tokens), _median_rate(theirs, tokens)) for _ in range(PAIRS)]
    finally:
        ours.end()
        theirs.end()
    ratios = [mine / peer for mine, peer in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "bench": "throughput",
        "case": precision,
        "value": round(middle, 3),
        "unit": "times the tokens/s of transformers",
        "baseline": round(statistics.median(peer for _, peer in pairs), 1),
        "goal": goal,
        "quartiles": [round(low, 3), round(high, 3)],
        "tokens_per_s": round(statistics.median(mine for mine, _ in pairs), 1),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(first["losses"], reference.LOSSES, strict=True)),
        "largest_norm_difference": max(abs(a / b - 1) for a, b in zip(first["norms"], other["norms"], strict=True)),
    }


def _median_rate(contestant: Contestant, tokens: int) -> float:
    return tokens / statistics.median(contestant.take(STEPS_A_TURN)["seconds"])
