"""Seconds from POST to the first training step, by phase, with Ray up: `cold` prepares
the data, `warm` finds them prepared.

`phases_s` add up to the whole, by the times of the history's events. `parts_s` look
into the last two of them: what the driver waited for (probe: until the workers'
processes answer, store: until rank 0 has imported torch and serves it, start) and what
rank 0 did after its order.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.support.running_stack import Road, stack

JOBS = 5
GOALS = {"cold": None, "warm": 8.0}
# The event that ends each phase.
PHASES = {
    "prepare": "job.prepared",
    "queue": "job.admitted",
    "place and start": "ranks.assigned",
    "first step": "job.running",
}


def run() -> Iterator[dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-road-") as folder,
        stack(Path(folder)) as road,
    ):
        for case, goal in GOALS.items():
            measured = [
                measure(road, f"{folder}/cache-{number if case == 'cold' else 'shared'}")
                for number in range(JOBS + 1)
            ]
            seconds = [
                total for total, _, _ in measured[1:]
            ]  # the first one warms Ray up, and the shared cache
            low, middle, high = statistics.quantiles(seconds, n=4)
            yield {
                "bench": "first_step",
                "case": case,
                "value": round(middle, 2),
                "unit": "seconds from POST to the first step, tp=2",
                "baseline": None,
                "goal": goal,
                "quartiles": [round(low, 2), round(high, 2)],
                "phases_s": medians([phases for _, phases, _ in measured[1:]]),
                "parts_s": medians([parts for _, _, parts in measured[1:]]),
            }


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """By name."""
    return {
        name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]
    }


def measure(road: Road, cache: str) -> tuple[float, dict[str, float], dict[str, float]]:
    """One job, ended again: total, and seconds of each phase and part by the service's
    history.
    """
    spec = road.spec(
        training={"steps": 5000},
        data={"tokenizer": {"kind": "bpe", "vocab_size": 512}, "cache": cache},
    )
    posted = time.time()
    job_id = road.client.submit(spec)["id"]
    road.step(job_id, 1)
    events = road.client.events(job_id, limit=100)["data"]
    road.client.cancel(job_id)
    road.finish(job_id)
    seen = {
        event["type"]: datetime.fromisoformat(event["created_at"]).timestamp()
        for event in events
    }
    ends = [posted, *(seen[name] for name in PHASES.values())]
    phases = {phase: ends[index + 1] - ends[index] for index, phase in enumerate(PHASES)}
    (started,) = [event["data"] for event in events if event["type"] == "ranks.started"]
    driver = {name: started[name] for name in ("probe", "store", "start")}
    rank = {
        event["data"]["phase"]: event["data"]["seconds"]
        for event in events
        if event["type"] == "rank.phase"
    }
    parts = {
        "place": phases["place and start"] - driver["store"] - driver["probe"],
        **driver,
        **rank,
    }
    parts["step"] = phases["first step"] - driver["start"] - sum(rank.values())
    return ends[-1] - posted, phases, parts
