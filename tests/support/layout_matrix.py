"""The matrix of layouts: legal combinations of all axes and options, drawn from a seed
so that every one of them is met often enough.

Pure: what is drawn is what validation calls legal. The seed is printed by the test that
runs it; MATRIX_SEED draws another matrix.
"""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation import check
from tests.support.parity import LLAMA

SEED = 20261121
MOST_RANKS = 8
ENTRIES = 30
SHAPE = LLAMA | {"num_layers": 4, "num_attention_heads": 8, "num_query_groups": 4}
# What families have that layouts can get wrong: every second layer has a window, heads
# are normed, some linears have biases.
SHAPE |= {
    "qk_norm": True,
    "qkv_bias": True,
    "sliding_window": 11,
    "full_attention_every": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden_size": 48,
    "aux_loss_coeff": 0.02,
}
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"granularity": "full", "method": "uniform", "num_layers": 1},
    {"granularity": "full", "method": "block", "num_layers": 1},
    {"granularity": "selective", "modules": ("core_attention", "norm")},
)
AXES = ("tp", "pp", "vpp", "cp", "ep", "dp")
OPTIONS = (
    "sp",
    "zero0",
    "zero1",
    "zero3",
    "p2p",
    "all_gather",
    "a2a",
    "a2a+p2p",
    "packed",
    "recompute",
)
QUOTAS = dict.fromkeys(AXES, 6) | dict.fromkeys(OPTIONS, 3)


@dataclass(frozen=True)
class Entry:
    """One layout with its options."""

    parallel: dict[str, Any]
    recompute: dict[str, Any] | None
    packed: bool

    @property
    def experts(self) -> bool:
        """Whether its model has experts."""
        return "ep" in self.parallel

    @property
    def name(self) -> str:
        """Readable, unique enough for a test's id."""
        words = [f"{key}{value}" for key, value in self.parallel.items() if key in AXES]
        words += [
            str(self.parallel[key])
            for key in ("schedule", "cp_method")
            if key in self.parallel
        ]
        words += [f"zero{self.parallel.get('zero', 1)}"] + [
            word for word in ("sp", "packed", "recompute") if word in self.features
        ]
        return "-".join(words)

    @property
    def features(self) -> set[str]:
        """Axes and options it has."""
        parallel = self.parallel
        axes = {axis for axis in AXES if parallel.get(axis, 1) > 1} | {
            f"zero{parallel.get('zero', 1)}"
        }
        axes |= {"sp"} if parallel.get("sequence_parallel") else set()
        axes |= {parallel.get("cp_method", "p2p")} if "cp" in axes else set()
        return (
            axes
            | ({"packed"} if self.packed else set())
            | ({"recompute"} if self.recompute else set())
        )

    @property
    def world_size(self) -> int:
        """Ranks it needs."""
        return int(
            self.parallel.get("tp", 1)
            * self.parallel.get("pp", 1)
            * self.parallel.get("cp", 1)
            * self.parallel["dp"]
        )

    def config(
        self, *, steps: int, precision: str = "fp32", alone: bool = False
    ) -> TrainConfig:
        """As the loop takes it; `alone`: the same model, data and steps on one rank."""
        model = SHAPE | ({"moe": EXPERTS} if self.experts else {})
        training: dict[str, Any] = {
            "seq_length": 32,
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "steps": steps,
            "seed": 7,
        }
        training |= {"precision": precision} | (
            {"recompute": self.recompute} if self.recompute and not alone else {}
        )
        return TrainConfig.from_mapping(
            {
                "model": model,
                "parallel": {"dp": 1}
                if alone
                else self.parallel | {"bucket_elements": 8000},
                "data": {
                    "train": [{"path": "unused"}],
                    "tokenizer": {"kind": "bytes"},
                    "separate_documents": self.packed,
                },
                "training": training,
                "optimizer": {
                    "lr": 3e-3,
                    "eps": 1e-5,
                    "weight_decay": 0.1,
                    "clip_grad_norm": 1.0,
                },
                "schedule": {"kind": "cosine", "warmup_steps": 3},
            }
        )


def draw(seed: int = SEED, count: int = ENTRIES) -> tuple[Entry, ...]:
    """`count` different legal entries with two axes or more, chosen so that every quota
    is met.
    """
    rng = random.Random(seed)
    entries: list[Entry] = []
    met = Counter[str]()
    while len(entries) < count:
        lacking = {
            name: quota - met[name] for name, quota in QUOTAS.items() if met[name] < quota
        }
        offered = sorted(
            (_candidate(rng) for _ in range(200)),
            key=lambda entry: -sum(lacking.get(name, 0) for name in entry.features),
        )
        # Few are looked at closely: every rank that loads the tests draws the matrix.
        best = next(entry for entry in offered if entry not in entries and _legal(entry))
        entries.append(best)
        met.update(best.features)
    return tuple(entries)


def _candidate(rng: random.Random) -> Entry:
    parallel: dict[str, Any] = {"dp": rng.choice((1, 2, 2, 4))}
    for axis, sizes in {"tp": (1, 2, 4), "pp": (1, 2, 4), "cp": (1, 2, 4)}.items():
        if (size := rng.choice(sizes)) > 1:
            parallel[axis] = size
    if parallel.get("pp") == 2 and rng.random() < 0.5:
        parallel |= {"vpp": 2, "schedule": "interleaved"}
    elif "pp" in parallel:
        parallel["schedule"] = rng.choice(("1f1b", "gpipe", "zb-h1"))
    if "tp" in parallel:
        parallel["sequence_parallel"] = rng.random() < 0.7
    if "cp" in parallel:
        parallel["cp_method"] = rng.choice(
            ("p2p", "all_gather", "a2a") if parallel["cp"] == 2 else ("p2p", "a2a+p2p")
        )
        parallel |= (
            {"hierarchical_cp_sizes": (2, 2)} if parallel["cp_method"] == "a2a+p2p" else {}
        )
    if rng.random() < 0.35:
        parallel |= {"ep": 2, "dispatcher": rng.choice(("alltoall", "allgather"))}
        parallel |= {"etp": rng.choice((1, 2))} if "tp" in parallel else {}
    parallel["zero"] = rng.choice((0, 1, 1, 3))
    return Entry(
        parallel,
        rng.choice(RECOMPUTE) if rng.random() < 0.25 else None,
        rng.random() < 0.25,
    )


def _legal(entry: Entry) -> bool:
    several = sum(
        entry.parallel.get(axis, 1) > 1 for axis in ("tp", "pp", "cp", "ep", "dp")
    )
    return (
        several >= 2
        and entry.world_size <= MOST_RANKS
        and not check.find_problems(entry.config(steps=10))
    )
