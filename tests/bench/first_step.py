"""Seconds from POST to the first training step, by phase, with Ray up: `cold` prepares the data, `warm` finds them prepared."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.integration.road import Road, stack

JOBS = 5
GOALS = {"cold": None, "warm": 8.0}
# The event that ends each phase.
PHASES = {"prepare": "job.prepared", "queue": "job.admitted", "place and start": "ranks.assigned", "first step": "job.running"}


def run() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="bench-road-") as folder, stack(Path(folder)) as road:
        for case, goal in GOALS.items():
            measured = [measure(road, f"{folder}/cache-{number if case == 'cold' else 'shared'}") for number in range(JOBS + 1)]
            seconds = [total for total, _ in measured[1:]]  # the first one warms Ray up, and the shared cache
            low, middle, high = statistics.quantiles(seconds, n=4)
            yield {
                "bench": "first_step",
                "case": case,
                "value": round(middle, 2),
                "unit": "seconds from POST to the first step, tp=2",
                "baseline": None,
                "goal": goal,
                "quartiles": [round(low, 2), round(high, 2)],
                "phases_s": {phase: round(statistics.median(parts[phase] for _, parts in measured[1:]), 2) for phase in PHASES},
            }


def measure(road: Road, cache: str) -> tuple[float, dict[str, float]]:
    """One job, ended again; total, and seconds of each phase by the service's history."""
    spec = road.spec(training={"steps": 5000}, data={"tokenizer": {"kind": "bpe", "vocab_size": 512}, "cache": cache})
    posted = time.time()
    job_id = road.client.submit(spec)["id"]
    road.step(job_id, 1)
    seen = {
        event["type"]: datetime.fromisoformat(event["created_at"]).timestamp() for event in road.client.events(job_id, limit=100)["data"]
    }
    ends = [posted, *(seen[name] for name in PHASES.values())]
    road.client.cancel(job_id)
    road.finish(job_id)
    return ends[-1] - posted, {phase: ends[index + 1] - ends[index] for index, phase in enumerate(PHASES)}
