"""Tokens per second against other libraries on the same model, tokens and initial
weights: one rank and one thread against Hugging Face transformers, eager and compiled,
and two ranks of one thread against megatron-core.

Both sides run as child processes with the same allocator environment and take turns, so
that a noisy machine hits both alike. Their first losses must be each other's (and the
reference's in fp32), else the comparison would be of different work.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import reference
from tests.bench.contestants import Terms

PAIRS = 9
STEPS_A_TURN = 4
LONG_S = 5.0
"""A step of this length is a turn by itself."""
Answer = dict[str, list[float]]
# glibc returns large blocks to the system at once by default; keeping them is worth a
# fifth of a step to either side.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Case:
    """Two programs on the same terms."""

    ours: str
    peer: str
    terms: Terms
    goal: float


def cases() -> dict[str, Case]:
    """By name."""
    by_name = {}
    for precision, eager, compiled in (("fp32", 1.15, 1.05), ("bf16", 1.3, 1.3)):
        by_name[f"eager-{precision}"] = Case(
            "ours", "transformers", Terms(precision), eager
        )
        by_name[f"compiled-{precision}"] = Case(
            "ours-compiled", "transformers-compiled", Terms(precision), compiled
        )
        for axis, degrees in (
            ("dp2", {"dp": 2}),
            ("tp2", {"tp": 2}),
            ("pp2", {"pp": 2, "micro_batch": 1}),
        ):
            terms = Terms(precision, **degrees)
            by_name[f"{axis}-{precision}"] = Case("ours", "megatron-core", terms, 1.25)
            by_name[f"{axis}-compiled-{precision}"] = Case(
                "ours-compiled", "megatron-core-compiled", terms, 1.25
            )
    return by_name


class Contestant:
    """A program in one child process per rank that trains on request."""

    def __init__(self, name: str, terms: Terms, folder: str) -> None:
        self.ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.bench.contestants",
                    name,
                    terms.to_json(),
                    str(rank),
                    f"{folder}/{name}",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
                env=os.environ
                | ALLOCATOR
                | {
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    "GLOO_SOCKET_IFNAME": "lo",
                },
            )
            for rank in range(terms.world_size)
        ]

    def take(self, steps: int) -> Answer:
        """One answer of all ranks: losses and norms are the last one's, who has the
        loss, seconds the longest's, CPU seconds the sum.
        """
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers: list[dict[str, Any]] = []
        for process in self.ranks:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"a contestant died: {process.args!r}")
            answers.append(json.loads(line))
        longest = max(answers, key=lambda answer: sum(answer["seconds"]))
        memory = max(answer["peak_mb"] for answer in answers)
        used = sum(answer["cpu_s"] for answer in answers)
        return answers[-1] | {
            "seconds": longest["seconds"],
            "cpu_s": [used],
            "peak_mb": [memory],
        }

    def end(self) -> None:
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.ranks:
            process.wait()


def run() -> Iterator[dict[str, Any]]:
    there = importlib.util.find_spec("megatron") is not None
    for name, case in cases().items():
        if case.peer.startswith("megatron-core") and not there:
            print(
                f"{name} is left out: pip install -c constraints.txt -e '.[peers]' brings "
                "megatron-core",
                file=sys.stderr,
            )
            continue
        yield compare(name, case)


def compare(name: str, case: Case) -> dict[str, Any]:
    """Median of the ratios of the pairs, with quartiles."""
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        ours, peer_program = (
            Contestant(who, case.terms, folder) for who in (case.ours, case.peer)
        )
        try:
            first = ours.take(case.terms.checked)
            other = peer_program.take(case.terms.checked)
            steps = (
                1
                if max(first["seconds"][-1], other["seconds"][-1]) > LONG_S
                else STEPS_A_TURN
            )
            turns = [
                _take_turns(ours, peer_program, steps, swapped=bool(number % 2))
                for number in range(PAIRS)
            ]
            memory = [
                contestant.take(0)["peak_mb"][0] for contestant in (ours, peer_program)
            ]
        finally:
            ours.end()
            peer_program.end()
    pairs = [(_rate(mine), _rate(peer)) for mine, peer in turns]
    low, middle, high = statistics.quantiles([mine / peer for mine, peer in pairs], n=4)
    return {
        "bench": "peers",
        "case": name,
        "value": round(middle, 3),
        "unit": f"times the tokens/s of {case.peer}",
        "baseline": round(statistics.median(peer for _, peer in pairs), 1),
        "goal": case.goal,
        "quartiles": [round(low, 3), round(high, 3)],
        "tokens_per_s": round(statistics.median(mine for mine, _ in pairs), 1),
        # What each used of the processors, which other guests of the machine disturb
        # less; waiting is not in it.
        "by_cpu_time": round(
            statistics.median(peer["cpu_s"][0] / mine["cpu_s"][0] for mine, peer in turns),
            3,
        ),
        "peak_mb": memory,
        "largest_loss_difference": _largest_difference(first["losses"], other["losses"]),
        "from_the_reference_in_fp32": _largest_difference(
            first["losses"], reference.LOSSES[: case.terms.checked]
        ),
        "largest_norm_difference": max(
            abs(a / b - 1) for a, b in zip(first["norms"], other["norms"], strict=True)
        ),
    }


def _largest_difference(ours: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, others, strict=True))


def _take_turns(
    ours: Contestant, peer: Contestant, steps: int, *, swapped: bool
) -> tuple[Answer, Answer]:
    """The first one alternates: it has the cooler processor, or the cache of another
    program.
    """
    answers = {
        id(one): one.take(steps) for one in ((peer, ours) if swapped else (ours, peer))
    }
    return answers[id(ours)], answers[id(peer)]


def _rate(answer: Answer) -> float:
    return (
        reference.GLOBAL_BATCH * reference.SEQUENCE / statistics.median(answer["seconds"])
    )
