"""A job with a whole history, from its creation to its end, as agent and driver report it."""

from collections.abc import Callable

import httpx

from tests.support.service_process import (
    SPEC,
    Json,
    Records,
    job_token,
    post,
    report_nodes,
    step_row,
)


def add_finished_job(
    user: httpx.Client, agent: httpx.Client, client: Callable[[str], httpx.Client]
) -> str:
    """Its id; `client` returns a client of the same service with another token."""
    report_nodes(agent)
    job_id = str(post(user, "/v1/jobs", SPEC)["id"])
    driver = client(job_token(agent, job_id))
    records = Records(job_id)
    path = f"/internal/v1/jobs/{job_id}/records"
    place: Json = {
        "rank": 0,
        "slot": 0,
        "node_id": "n1",
        "address": "10.0.0.1",
        "gpu": None,
    }
    place |= {"pid": 7, "coordinates": {"dp": 0}}
    checkpoint = {"step": 3, "path": "/checkpoints/3", "bytes": 9, "loss": 8.9}
    diagnosis: Json = {"trigger": "request", "reason": "the job makes progress"}
    diagnosis |= {"confidence": "high", "culprits": [], "ranks": [], "stacks": []}
    batches: list[tuple[str, int, list[tuple[str, Json]]]] = [
        ("driver", 0, [("prepared", {"manifest": {}, "unigram_nats": 5.5})]),
        ("driver", 0, [("state", {"state": "scheduling"})]),
        ("driver", 1, [("attempt", {"state": "starting", "world_size": 1})]),
        ("driver", 1, [("ranks", {"ranks": [place]})]),
        ("driver", 1, [("state", {"state": "starting"})]),
        ("driver", 1, [("state", {"state": "running"})]),
        ("a1/r0", 1, [step_row(1), step_row(2), step_row(3)]),
        ("driver", 1, [("checkpoint", checkpoint)]),
        ("driver", 1, [("diagnosis", diagnosis)]),
        ("driver", 1, [("attempt", {"state": "succeeded"})]),
        ("driver", 1, [("state", {"state": "succeeded"})]),
    ]
    for source, attempt, facts in batches:
        post(driver, path, records.batch(source, attempt, *facts))
    return job_id
