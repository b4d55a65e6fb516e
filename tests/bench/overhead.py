"""What being a job costs a step: the same run as a job and under torchrun, turn by
turn, beside the same idle Ray head and service.

One reader of server-sent events is connected in both: to the job itself, or, while
torchrun runs, to a job in the queue that waits for a node too large to come, in all
rounds alike: its stream idles. The data are prepared once, in a cache that both share;
both train with one torch thread per rank. The first steps of each run are left out.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch.distributed as dist

from megatron_ray.distributed import recording
from megatron_ray.distributed.stores import HashStore
from megatron_ray.reports import STEP_PARTS, StepReport
from tests.support.running_stack import Road, stack
from workers.protocol.wire import AgentReport, NodeInfo
from workers.rank.attempt import RankAttempt
from workers.rank.environment import RankEnv
from workers.rank.messages import StartRequest

ROUNDS = 7
STEPS = 200
WARMUP = 20
CASES: dict[str, tuple[int, float | None]] = {"rank-1": (1, 1.02), "tp-2": (2, None)}
"""Ranks, goal."""
MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": 384,
}
REPORTS = 20_000
RECORDS = 20_000
RECORD_ROUNDS = 15
ROOT = Path(__file__).parents[2]
_READER = """
import sys
from service.client import Client
url, job_id = sys.argv[1:]
for number, _ in enumerate(Client(url, sys.stdin.readline().strip()).stream(job_id)):
    if number == 0:
        print("reading", flush=True)
"""


def run() -> Iterator[dict[str, Any]]:
    yield report_cost()
    yield record_cost()
    with (
        tempfile.TemporaryDirectory(prefix="bench-road-") as folder,
        stack(Path(folder)) as road,
    ):
        waiting = wait_in_queue(road, folder)
        for case, (ranks, goal) in CASES.items():
            yield compare(road, folder, waiting, case, ranks, goal)


def compare(
    road: Road, folder: str, waiting: str, case: str, ranks: int, goal: float | None
) -> dict[str, Any]:
    """Median over the rounds of the ratio of the two median step times; who goes first
    alternates.
    """
    spec = job(road, folder, ranks)
    as_job(road, spec)  # warms Ray up and prepares the data
    pairs = []
    for number in range(ROUNDS):
        if number % 2:
            bare = under_torchrun(road, folder, waiting, spec, ranks)
            job_s = as_job(road, spec)
        else:
            job_s = as_job(road, spec)
            bare = under_torchrun(road, folder, waiting, spec, ranks)
        pairs.append((job_s, bare))
        print(
            f"{case}: round {number + 1}: {job_s * 1e3:.2f} ms as a job, {bare * 1e3:.2f} "
            "ms under torchrun",
            file=sys.stderr,
        )
    low, middle, high = statistics.quantiles([mine / bare for mine, bare in pairs], n=4)
    return {
        "bench": "overhead",
        "case": case,
        "value": round(middle, 4),
        "unit": "times the median step under torchrun",
        "baseline": round(statistics.median(bare for _, bare in pairs) * 1e3, 3),
        "goal": goal,
        "quartiles": [round(low, 4), round(high, 4)],
        "job_ms": round(statistics.median(mine for mine, _ in pairs) * 1e3, 3),
        "torchrun_ms": round(statistics.median(bare for _, bare in pairs) * 1e3, 3),
        "rounds": ROUNDS,
        "steps_a_round": STEPS,
    }


def wait_in_queue(road: Road, folder: str) -> str:
    """A job that nothing will ever run.

    The service refuses what cannot fit, so a large node is reported for a moment.
    """
    token = json.loads((road.data_dir / "tokens.json").read_text())["agent"]
    node = NodeInfo(node_id="passing", address="127.0.0.1", cpus=1000)
    report = AgentReport(
        cluster="default",
        agent_id="bench",
        code_version="",
        ray_version="",
        namespace="",
        nodes=(node,),
    )
    url = f"{road.record.url}/internal/v1/agent/report"
    headers = {"Authorization": f"Bearer {token}"}
    httpx.post(url, headers=headers, content=report.model_dump_json()).raise_for_status()
    job_id: str = road.client.submit(
        job(road, folder, 1) | {"resources": {"accelerator": "cpu", "cpus_per_rank": 1000}}
    )["id"]
    road.wait(
        job_id,
        lambda queued: (
            queued["status"] == "queued" and queued["status_reason"] == "waiting_quota"
        ),
    )
    return job_id


def job(road: Road, folder: str, ranks: int) -> dict[str, Any]:
    """One run: no evaluation and no checkpoint falls between its steps."""
    return road.spec(
        model=MODEL,
        parallel={"tp": ranks, "dp": 1},
        training={
            "seq_length": 128,
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "steps": WARMUP + STEPS,
        },
        checkpoint={"every_steps": None},
        data={
            "train": [{"path": str(road.corpus)}],
            "tokenizer": {"kind": "bytes"},
            "cache": f"{folder}/cache",
        },
        resources={"accelerator": "cpu", "cpus_per_rank": 1},
    )


def as_job(road: Road, spec: dict[str, Any]) -> float:
    """Median seconds of a step of a job that a reader follows to its end."""
    job_id = road.client.submit(spec)["id"]
    with reader(road, job_id) as stream:
        stream.wait(timeout=600)
    assert road.client.show(job_id)["status"] == "succeeded", road.client.show(job_id)
    rows = road.client.metrics(job_id, keys="step_s")["data"]
    assert [row["step"] for row in rows] == list(range(1, WARMUP + STEPS + 1))
    steps: list[float] = [row["step_s"] for row in rows]
    return statistics.median(steps[WARMUP:])


def under_torchrun(
    road: Road, folder: str, waiting: str, spec: dict[str, Any], ranks: int
) -> float:
    """The same without Ray: `workers.rank` started by torchrun, while another job's
    stream is read.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place, reader(road, waiting):
        described = Path(place, "job.yaml")
        reports = Path(place, "reports.jsonl")
        described.write_text(json.dumps(spec | {"storage": {"path": f"{place}/out"}}))
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        command = [
            *torchrun,
            "-m",
            "workers.rank",
            str(described),
            "--reports",
            str(reports),
        ]
        threads = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }  # what a worker sets; torchrun does so from two ranks on
        subprocess.run(
            command,
            check=True,
            timeout=600,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | threads,
        )
        records = [json.loads(line) for line in reports.read_bytes().splitlines()]
    steps: list[float] = [
        record["data"]["step_s"] for record in records if record["kind"] == StepReport.kind
    ]
    assert len(steps) == WARMUP + STEPS
    return statistics.median(steps[WARMUP:])


@contextmanager
def reader(road: Road, job_id: str) -> Iterator[subprocess.Popen[str]]:
    """A process that reads a job's stream until the job or the block ends; it has read
    the first event when this enters.
    """
    command = [sys.executable, "-c", _READER, road.record.url, job_id]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{road.record.token}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "reading\n"
        yield process
    finally:
        process.kill()
        process.wait()


def report_cost() -> dict[str, Any]:
    """Microseconds of the training thread for one StepReport, from the loop's call to
    the written line.
    """
    rng = random.Random(1)
    costs = []
    with tempfile.TemporaryDirectory(prefix="bench-report-") as folder:
        order = StartRequest(RankEnv(0, 1, 0, 1), {}, {}, 1, "cpu")
        attempt = RankAttempt(order, lambda *_: "finished", Path(folder))
        for step in range(1, REPORTS + 1):
            item = step_report(step, rng)
            started = time.perf_counter()
            attempt.report(item)
            costs.append((time.perf_counter() - started) * 1e6)
    quantiles = statistics.quantiles(costs, n=100)
    return {
        "bench": "overhead",
        "case": "report",
        "value": round(statistics.median(costs), 2),
        "unit": "microseconds of the training thread per step report",
        "baseline": None,
        "goal": 20.0,
        "quartiles": [round(quantiles[24], 2), round(quantiles[74], 2)],
        "p99": round(quantiles[98], 2),
    }


class Arrived:
    """A collective that is done at once."""

    def wait(self) -> None:
        return None


def record_cost() -> dict[str, Any]:
    """Nanoseconds that the process's record of collectives adds to one of them."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.new_group([0])
    assert group is not None
    recording.name_groups({"dp": group})
    work = Arrived()
    costs = []
    for _ in range(RECORD_ROUNDS):
        started = time.thread_time_ns()
        for _ in range(RECORDS):
            entry = recording.enter("all_reduce", group)
            entry.work = work
            entry.wait()
        between = time.thread_time_ns()
        for _ in range(RECORDS):
            work.wait()
        bare = time.thread_time_ns() - between
        costs.append((between - started - bare) / RECORDS)
    dist.destroy_process_group()
    low, middle, high = statistics.quantiles(costs, n=4)
    return {
        "bench": "overhead",
        "case": "collective-record",
        "value": round(middle),
        "unit": "nanoseconds of the training thread per collective, for its record",
        "baseline": None,
        "goal": 1000,
        "quartiles": [round(low), round(high)],
    }


def step_report(step: int, rng: random.Random) -> StepReport:
    """A report as the loop fills it: all digits of every number."""
    split: dict[str, float] = {part: rng.random() for part in STEP_PARTS}
    return StepReport(
        step,
        10 * rng.random(),
        rng.random(),
        1e-3 * rng.random(),
        1024,
        8 * step,
        0.03,
        3e4 * rng.random(),
        0.0,
        3 << 28,
        split,
    )
