"""How well the estimate of a step's time does on published runs: fitted to all others
of its chip and precision, held against each.

Only runs whose layout is published in full are in the file. They were made by other
software, which hides and fuses other things, so this judges the model of a step, not
this library.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from typing import Any

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.hardware import HARDWARE, Efficiency
from megatron_ray.planning.step_time.estimate import StepParts, step_parts
from megatron_ray.validation import check

FILE = Path(__file__).with_name("published_runs.json")
GOAL = 0.7
TOLERANCE = 0.25
# Where an efficiency may lie; what is hidden behind products makes the network look
# faster than it is.
BOUNDS = {
    "products": (0.3, 0.95),
    "attention": (0.1, 0.9),
    "memory": (0.3, 1.0),
    "network": (0.3, 2.0),
}
START = Efficiency(products=0.7, attention=0.45, memory=0.7, network=0.7)
_PULL = 0.02
"""How much a run weighs against the start, so that what the runs do not tell stays
there."""


@dataclass(frozen=True)
class Run:
    """One published run."""

    name: str
    chip: str
    precision: str
    parts: StepParts
    step_s: float
    """As published."""


def load() -> list[Run]:
    """Every run of the file."""
    content = json.loads(FILE.read_text())
    return [_run(entry, content["models"][entry["model"]]) for entry in content["runs"]]


def _run(entry: dict[str, Any], model: dict[str, Any]) -> Run:
    parallel = entry["parallel"]
    ranks = entry["gpus"]
    training = {
        "seq_length": entry["sequence"],
        "micro_batch_size": entry["micro_batch"],
        "global_batch_size": entry["global_batch"],
        "steps": 1,
        "precision": "bf16",  # of activations, also where products are fp8
    }
    if entry.get("recompute") == "full":
        training["recompute"] = {
            "granularity": "full",
            "method": "uniform",
            "num_layers": 1,
        }
    dp = ranks // (parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1))
    fields = {
        "model": model | {"max_sequence_length": entry["sequence"]},
        "parallel": parallel | {"dp": dp},
        "data": {"train": [{"path": "unused"}]},
        "training": training,
        "optimizer": {"lr": 1e-4},
    }
    config = TrainConfig.from_mapping(fields)
    problems = check.find_problems(config, ranks)
    if problems:
        raise ValueError(f"{entry}: {problems[0].detail}")
    parts = step_parts(config, HARDWARE[entry["chip"]], entry["precision"])
    words = [
        f"{axis}{size}"
        for axis, size in parallel.items()
        if axis in ("tp", "pp", "vpp", "cp", "zero") and size != 1
    ]
    name = " ".join(
        [
            entry["source"],
            entry["model"],
            f"seq{entry['sequence']}",
            f"{ranks} GPUs",
            f"micro{entry['micro_batch']}",
            *words,
        ]
    )
    return Run(
        name, entry["chip"], entry["precision"], parts, _published_seconds(entry, config)
    )


def _published_seconds(entry: dict[str, Any], config: TrainConfig) -> float:
    tokens = entry["sequence"] * entry["global_batch"]
    if "tokens_per_s_per_gpu" in entry:
        return float(tokens / (entry["tokens_per_s_per_gpu"] * entry["gpus"]))
    model = config.model
    length = entry["sequence"]
    # Narayanan et al. 2021, eq. 3: forward, backward and a second forward.
    hidden = model.hidden_size
    layers = model.num_layers
    flops = (
        96
        * tokens
        * layers
        * hidden**2
        * (1 + length / (6 * hidden) + model.vocabulary / (16 * layers * hidden))
    )
    return float(flops / (entry["recomputing_tflops_per_gpu"] * 1e12 * entry["gpus"]))


def fit(runs: Sequence[Run]) -> Efficiency:
    """One set of efficiencies: least squares of the logarithm of estimate / published,
    one constant after another.
    """
    best = START
    lowest = _loss(best, runs)
    factor = 1.2
    while factor > 1.002:
        improved = False
        for name, (low, high) in BOUNDS.items():
            for step in (factor, 1 / factor):
                value = min(high, max(low, getattr(best, name) * step))
                tried = replace(best, **{name: value})
                loss = _loss(tried, runs)
                if loss < lowest:
                    best = tried
                    lowest = loss
                    improved = True
        if not improved:
            factor = factor**0.5
    return best


def _loss(share: Efficiency, runs: Sequence[Run]) -> float:
    pull = sum(log(getattr(share, name) / getattr(START, name)) ** 2 for name in BOUNDS)
    return (
        sum(log(run.parts.step_time(share).step_s / run.step_s) ** 2 for run in runs)
        + _PULL * pull
    )


def held_out(runs: Sequence[Run]) -> Iterator[tuple[Run, float]]:
    """Each run with estimate / published, by constants fitted to all others of its chip
    and precision.
    """
    for run in runs:
        others = [
            other
            for other in runs
            if other is not run
            and (other.chip, other.precision) == (run.chip, run.precision)
        ]
        yield run, run.parts.step_time(fit(others)).step_s / run.step_s


def run() -> Iterator[dict[str, Any]]:
    runs = load()
    ratios = list[float]()
    for published, ratio in held_out(runs):
        ratios.append(ratio)
        case = f"{published.chip} {published.precision}: {published.name}"
        yield {
            "bench": "plan",
            "case": case,
            "value": round(ratio, 3),
            "unit": "estimated / published step",
            "baseline": round(published.step_s, 4),
            "goal": 1,
        }
    for chip, precision in sorted({(one.chip, one.precision) for one in runs}):
        share = fit([one for one in runs if (one.chip, one.precision) == (chip, precision)])
        for name in BOUNDS:
            value = round(getattr(share, name), 3)
            yield {
                "bench": "plan",
                "case": f"{chip} {precision} {name}",
                "value": value,
                "unit": "share",
                "baseline": None,
                "goal": None,
            }
    close = sum(1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE for ratio in ratios) / len(
        ratios
    )
    spread = exp(sum(abs(log(ratio)) for ratio in ratios) / len(ratios))
    yield {
        "bench": "plan",
        "case": "held out within 25 %",
        "value": round(close, 3),
        "unit": "share of runs",
        "baseline": None,
        "goal": GOAL,
    }
    yield {
        "bench": "plan",
        "case": "typical error",
        "value": round(spread, 3),
        "unit": "ratio",
        "baseline": None,
        "goal": 1,
    }
