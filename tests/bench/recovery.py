"""What a SIGKILL costs: of a rank, until there is a step beyond all done before; of the
service, until it serves again; of the driver, the longest pause between two steps, in
medians. How long a silent node is unnoticed, and a job takes from SIGTERM to its node to
a committed checkpoint. And how long a hang takes, here a rank that is stopped, to be named
beyond its limit.

A rank's times are those of its own report file, by the clock of the machine. `rank`
strikes at a random step between two checkpoints.
"""

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from service.local_stack.ray_head import ray_environment
from tests.support.fault_injection import RankFile, busy_workers, history, until
from tests.support.joined_node import DRAIN_S, JoinedNode, joined_node
from tests.support.running_stack import Road, stack

KILLS = 10
EVERY_STEPS = 50
"""Steps between checkpoints of the job that loses ranks."""
COPY_EVERY_STEPS = 10
WARM_S = 8.0
"""From the birth of the process that stands by until it has surely imported
everything."""
PAUSE_S = 3.0
"""Between two kills of the service, which serves meanwhile."""
HANGS = 3
HANG_LIMIT_S = 10.0
"""Time without a report after which an attempt counts as hung."""
LOST_NODES = 3
TRIES = 10
"""Jobs that are started until one has its driver on another node than its ranks."""
NODE_CPUS = 4
"""CPUs of a node that joins the stack: a job of two ranks fits on it and not on the
stack's own."""
WATCHED_S = 15.0
"""How long a job's steps are looked at after its driver is killed."""
# The training thread and what it does are the library's reference shape: a step of 20
# to 50 ms at tp=2 on two cores.
STEP = {
    "model": {
        "num_layers": 1,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_hidden_size": 384,
    },
    "training": {
        "seq_length": 128,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "steps": 1_000_000,
    },
}
Measured = tuple[float, dict[str, float]]
"""A value, and its parts."""


def run() -> Iterator[dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-road-") as folder,
        stack(Path(folder)) as road,
    ):
        spec = road.spec(
            **STEP,
            checkpoint={"every_steps": EVERY_STEPS},
            restart={"max_failures": 1000, "backoff_s": 0},
        )
        yield line(
            "rank",
            "seconds from SIGKILL to a step beyond all before, tp=2",
            5.0,
            measured(road, spec, kill_rank),
        )
        copied = {**spec["checkpoint"], "peer_every_steps": COPY_EVERY_STEPS}
        yield line(
            "rank-peer-copies",
            f"the same with copies in memory every {COPY_EVERY_STEPS} steps",
            None,
            measured(road, {**spec, "checkpoint": copied}, kill_rank),
        )
        cold = {**spec, "restart": {**spec["restart"], "standby": False}}
        yield line(
            "rank-cold",
            "the same without a process that stands by",
            None,
            measured(road, cold, kill_rank),
        )
        hanging = {**spec["restart"], "hang_timeout_s": HANG_LIMIT_S}
        yield line(
            "hang",
            f"seconds beyond the limit of {HANG_LIMIT_S:g} s until the rank is named, tp=2",
            10.0,
            measured(road, {**spec, "restart": hanging}, hang_rank, HANGS),
        )
        yield line(
            "service",
            "seconds from SIGKILL to serving again",
            3.0,
            measured(road, spec, kill_service),
        )
        # No checkpoint and no evaluation falls between the steps that are looked at.
        spec = road.spec(
            **STEP,
            checkpoint={"every_steps": None},
            restart={"max_failures": 1000, "backoff_s": 0},
        )
        yield line(
            "driver",
            "longest pause between two steps after SIGKILL, in medians, tp=2",
            3.0,
            measured(road, spec, kill_driver),
        )
        yield line(
            "silent-node",
            "seconds from SIGSTOP of a whole node until the job has noticed, tp=2",
            15.0,
            lost_nodes(road, spec, JoinedNode.freeze, "attempt.failed"),
        )
        yield line(
            "drained-node",
            "seconds from SIGTERM to a node to a committed checkpoint, tp=2",
            float(DRAIN_S),
            lost_nodes(road, spec, JoinedNode.terminate, "checkpoint.committed"),
        )


def measured(
    road: Road,
    spec: dict[str, Any],
    kill: Callable[[Road, str, RankFile], Measured],
    times: int = KILLS,
) -> list[Measured]:
    """One job for all kills; ended at last."""
    job_id = road.client.submit(spec)["id"]
    with RankFile(road, job_id) as file:
        file.reached(EVERY_STEPS + 10)
        kills = [kill(road, job_id, file) for _ in range(times)]
        road.client.cancel(job_id)
        road.finish(job_id)
    return kills


def line(case: str, unit: str, goal: float | None, kills: list[Measured]) -> dict[str, Any]:
    """Median, quartiles and worst; medians of the parts."""
    values = [value for value, _ in kills]
    low, middle, high = statistics.quantiles(values, n=4)
    return {
        "bench": "recovery",
        "case": case,
        "value": round(middle, 3),
        "unit": unit,
        "baseline": None,
        "goal": goal,
        "quartiles": [round(low, 3), round(high, 3)],
        "worst": round(max(values), 3),
        **{
            part: round(statistics.median(parts[part] for _, parts in kills), 4)
            for part in kills[0][1]
        },
    }


def kill_rank(road: Road, job_id: str, file: RankFile) -> Measured:
    """The last rank dies.

    Detection is what the driver's own account of the recovery leaves over.
    """
    if road.client.show(job_id)["resolved_spec"]["restart"]["standby"]:
        until(
            "a process that stands by",
            lambda: (
                len([title for _, title in busy_workers(road) if "RankWorker" in title])
                == 3
            ),
            60,
        )
        time.sleep(WARM_S)
    commits = (road.client.show(job_id)["last_checkpoint"] or {"step": 0})["step"]
    road.wait(
        job_id, lambda job: job["last_checkpoint"]["step"] > commits
    )  # else it would look like a crash loop
    steps = file.steps()
    attempt = steps[-1]["attempt"]
    file.reached(steps[-1]["step"] + random.randrange(EVERY_STEPS), attempt=attempt)
    pid = road.pids(job_id)[-1]
    last_event = history(road, job_id)[-1]["id"]
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    recovered = until(
        "the driver's account of the recovery",
        lambda: account(road, job_id, last_event),
        120,
    )
    seen = datetime.fromisoformat(recovered["created_at"]).timestamp()
    split = recovered["data"]
    (new,) = [
        row
        for row in file.steps()
        if row["attempt"] > attempt and row["step"] == split["step"]
    ]
    total = new["at"] - killed
    parts = {part: split[part] for part in ("rebuild_s", "load_s", "recompute_s")}
    return total, {
        "detect_s": seen - split["seconds"] - killed,
        **parts,
        "steps_again": split["step"] - 1 - split["from_step"],
    }


def hang_rank(road: Road, job_id: str, file: RankFile) -> Measured:
    """The last rank is stopped; the driver's account names it, and the job goes on."""
    commits = (road.client.show(job_id)["last_checkpoint"] or {"step": 0})["step"]
    road.wait(job_id, lambda job: job["last_checkpoint"]["step"] > commits)
    pid = road.pids(job_id)[-1]
    last_event = history(road, job_id)[-1]["id"]
    stopped = time.time()
    os.kill(pid, signal.SIGSTOP)
    hang = until(
        "the rank to be named", lambda: event_after(road, job_id, last_event, "hang"), 60
    )
    assert hang["ranks"] == [1], hang
    named = datetime.fromisoformat(hang["created_at"]).timestamp() - stopped
    until("the recovery", lambda: account(road, job_id, last_event), 120)
    return max(0.0, named - HANG_LIMIT_S), {"named_s": named}


def event_after(road: Road, job_id: str, after: str, name: str) -> dict[str, Any] | None:
    """The first event `attempt.<name>` after another one."""
    events = road.client.events(job_id, limit=1000, after=after)["data"]
    return next((event for event in events if event["type"] == f"attempt.{name}"), None)


def account(road: Road, job_id: str, after: str) -> dict[str, Any] | None:
    """The event with the time that it took to do new work."""
    events = road.client.events(job_id, limit=1000, after=after)["data"]
    return next((event for event in events if event["type"] == "job.recovered"), None)


def kill_service(road: Road, job_id: str, file: RankFile) -> Measured:
    """Over when the API answers again; the job trains on meanwhile."""
    before = road.service_session()
    started = time.monotonic()
    os.kill(before.sid, signal.SIGKILL)
    until(
        "the service serving again",
        lambda: road.service_session() != before and road.answers(),
        120,
    )
    taken = time.monotonic() - started
    time.sleep(PAUSE_S)
    return taken, {}


def kill_driver(road: Road, job_id: str, file: RankFile) -> Measured:
    """Adopted by the next driver within the time that is looked at; the ranks go on."""
    (pid,) = [
        pid for pid, title in busy_workers(road) if title.startswith("ray::JobDriver")
    ]
    pids = road.pids(job_id)
    first = file.steps()[-1]["step"]
    os.kill(pid, signal.SIGKILL)
    killed = time.time()
    time.sleep(WATCHED_S)  # nothing else, so that looking disturbs nothing
    until("the next driver", lambda: pid not in (pids := drivers(road)) and pids, 60)
    assert road.pids(job_id) == pids, "the same ranks go on"
    rows = [
        row["at"]
        for row in file.steps()
        if row["step"] >= first and row["at"] <= killed + WATCHED_S
    ]
    gaps = [later - earlier for earlier, later in pairwise(rows)]
    median = statistics.median(gaps)
    return max(gaps) / median, {"median_step_s": median, "longest_s": max(gaps)}


def lost_nodes(
    road: Road, spec: dict[str, Any], lose: Callable[[JoinedNode], None], name: str
) -> list[Measured]:
    """Jobs on joined nodes, each of which is lost in turn.

    The value is the time until the first event of a name; the job then goes on elsewhere.
    """
    record = road.record
    environment = ray_environment(record.ray_token, Path(record.temp_dir))
    spec = {
        **spec,
        "resources": {"cpus_per_rank": NODE_CPUS / 2, "placement_timeout_s": 600},
        "restart": {"max_failures": 1000, "backoff_s": 0, "standby": False},
    }
    losses: list[Measured] = []
    with ExitStack() as stack_of_nodes:

        def join() -> JoinedNode:
            before = living_nodes(road)
            node = stack_of_nodes.enter_context(
                joined_node(record.ray_address, NODE_CPUS, environment)
            )
            # Of two that join an address at the same moment Ray admits one.
            until("the node", lambda: living_nodes(road) - before, 180)
            return node

        nodes = [join(), join()]
        for _ in range(LOST_NODES):
            job_id, node = start_apart(road, nodes, spec)
            attempt = road.client.show(job_id)["attempt"]
            last_event = history(road, job_id)[-1]["id"]
            lost = time.time()
            lose(node)
            event = until(name, partial(first_event, road, job_id, last_event, name), 60)
            at = datetime.fromisoformat(event["created_at"]).timestamp()
            losses.append((at - lost, {}))
            road.wait(job_id, partial(is_later, attempt), 300)
            road.client.cancel(job_id)
            road.finish(job_id)
            node.kill()
            nodes.remove(node)
            nodes.append(join())
    return losses


def start_apart(
    road: Road, nodes: list[JoinedNode], spec: dict[str, Any]
) -> tuple[str, JoinedNode]:
    """Starts a job whose ranks are on one of the nodes, and its driver is not.

    A driver on the same node would be lost too, which Ray notices after a minute.
    """
    for _ in range(TRIES):
        job_id = road.client.submit(spec)["id"]
        road.wait(job_id, is_running, 300)
        road.step(job_id, 20)
        pid = road.pids(job_id)[0]
        (node,) = [node for node in nodes if node.has(pid)]
        if not any(node.has(driver) for driver in drivers(road)):
            return job_id, node
        road.client.cancel(job_id)
        road.finish(job_id)
    raise SystemExit(f"{TRIES} drivers were on the node of their ranks")


def living_nodes(road: Road) -> set[str]:
    """Ids of living nodes, as the agent reports them."""
    (cluster,) = road.client.cluster()["data"]
    return {node["node_id"] for node in cluster["nodes"] if node["alive"]}


def is_running(job: dict[str, Any]) -> bool:
    return bool(job["status"] == "running")


def is_later(attempt: int, job: dict[str, Any]) -> bool:
    return is_running(job) and bool(job["attempt"] > attempt)


def first_event(road: Road, job_id: str, after: str, name: str) -> dict[str, Any] | None:
    """The first event of a type after another event."""
    events = road.client.events(job_id, limit=1000, after=after)["data"]
    return next((event for event in events if event["type"] == name), None)


def drivers(road: Road) -> list[int]:
    """Pids of living drivers."""
    return [pid for pid, title in busy_workers(road) if title.startswith("ray::JobDriver")]
