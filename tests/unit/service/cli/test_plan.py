"""`plan` and its suggestions, for people and as JSON."""

import json
from pathlib import Path

import pytest

from service.api.plans.bodies import Plan, Suggestions
from service.client import Client
from tests.support.fake_rest_service import FakeService, Run

TIME = {
    "step_s": 1.5,
    "products_s": 0.8,
    "attention_s": 0.1,
    "memory_s": 0.3,
    "communication_s": 0.2,
    "bubble_s": 0.0,
} | {
    "update_s": 0.1,
    "tokens_per_s": 90000.0,
    "mfu": 0.41,
    "model_flops": 1e15,
}


@pytest.mark.parametrize("fits", [True, False])
def test_plan(run: Run, service: FakeService, fits: bool) -> None:
    answer = {
        "object": "plan",
        "resolved_spec": {
            "parallel": {"tp": 2, "dp": 1},
            "training": {"steps": 1000, "global_batch_size": 4, "seq_length": 64},
        },
        "world_size": 2,
        "ranks": [{"rank": 0, "island": 0, "coordinates": {"tp": 0}}],
        "memory": {"rank": 0, "parameters_bytes": 4 << 20},
        "communication": [
            {"axis": "tp", "kind": "all_reduce", "operations": 12, "bytes": 3 << 20},
            {"axis": "dp", "kind": "all_gather", "operations": 1, "bytes": 1 << 20},
        ],
        "checkpoint_bytes": 6 << 20,
        "num_checkpoints": 3,
        "bubble_share": 0.0,
        "hardware": "H100",
        "time": TIME,
        "fits": fits,
        "problems": []
        if fits
        else [
            {
                "pointer": "/parallel",
                "detail": "2 ranks, but there is room for 1; add nodes",
            }
        ],
    }
    service.routes["POST /v1/plans"] = (200, answer)
    code, out, err = run("plan", "spec.yaml", "--hardware", "H100", "--url", service.url)
    assert "2 ranks" in out
    assert "tp=2 x dp=1" in out
    assert "1,000 steps of 4 x 64 tokens: 256,000 tokens" in out
    assert "4.0 MiB" in out
    assert "tp all-reduce" in out
    assert "storage for checkpoints: 18.0 MiB (3 of 6.0 MiB, at most at once)" in out
    assert "memory on the most loaded rank (rank 0)" in out
    assert "3.0 MiB in 12 calls" in out
    assert "1.0 MiB in 1 call\n" in out
    assert "on H100, estimated: 1.50 s" in out
    assert "MFU 41.0 %" in out
    assert "matmuls" in out
    assert "800.0 ms" in out
    assert "bubble" not in out
    assert code == (0 if fits else 1)
    assert ("/parallel: 2 ranks, but there is room for 1; add nodes" in err) is not fits
    assert ("this job does not fit" in err) is not fits
    assert service.requests[0][1]["name"] == "tiny"


def test_problems_of_a_job_that_fits_are_no_lack_of_room(
    run: Run, service: FakeService
) -> None:
    problem = {"pointer": "/checkpoint/start_from", "detail": "cannot read it"}
    answer = {"object": "plan", "world_size": 1, "fits": True, "problems": [problem]}
    service.routes["POST /v1/plans"] = (200, answer)
    code, _, err = run("plan", "spec.yaml", "--url", service.url)
    assert code == 1
    assert "this job cannot run" in err
    assert "/checkpoint/start_from: cannot read it" in err


def test_suggestions(run: Run, service: FakeService) -> None:
    changes = {
        "parallel.tp": 4,
        "parallel.pp": 2,
        "parallel.dp": 8,
        "training.micro_batch_size": 2,
    }
    entry = {
        "changes": changes | {"training.recompute": {"granularity": "full"}},
        "total_bytes_estimate": 70 << 30,
        "time": TIME,
    }
    answer = {
        "object": "plan.suggestions",
        "world_size": 64,
        "hardware": "H100",
        "data": [entry],
        "notes": [],
    }
    service.routes["POST /v1/plans/suggest"] = (200, answer)
    code, out, _ = run(
        "plan", "spec.yaml", "--suggest", "--ranks", "64", "--url", service.url
    )
    assert code == 0
    assert "64 ranks of H100" in out
    assert out.splitlines()[-1].split() == [
        "4",
        "2",
        "1",
        "1",
        "1",
        "8",
        "2",
        "full",
        "1.50",
        "s",
        "41.0",
        "%",
        "70.0",
        "GiB",
    ]
    service.routes["POST /v1/plans/suggest"] = (
        200,
        answer | {"data": [], "notes": ["no layout fits on 64 ranks"]},
    )
    code, out, err = run("plan", "spec.yaml", "--suggest", "--url", service.url)
    assert code == 1
    assert "no layout fits on 64 ranks" in out
    assert "no layout can be suggested" in err


def test_ranks_of_a_plan_are_those_of_its_degrees(run: Run, service: FakeService) -> None:
    code, _, err = run("plan", "spec.yaml", "--ranks", "64", "--url", service.url)
    assert code == 1
    assert "--ranks needs --suggest" in err
    assert service.requests == []


def test_without_a_service_a_plan_is_made_from_the_spec_alone(run: Run) -> None:
    bf16 = ("--set", "training.precision=bf16")
    code, out, err = run("plan", "spec.yaml", "--hardware", "h100", "--ranks", "4", *bf16)
    assert (code, err) == (0, "")
    assert "4 ranks  tp=1 x cp=1 x ep=1 x dp=4 x pp=1" in out
    assert "on H100, estimated:" in out
    assert "neither its paths nor a cluster were looked at" in out
    assert "every rank fits into the memory of one H100" in out
    code, out, _ = run("plan", "spec.yaml", "--hardware", "H100", *bf16, "--json")
    answer = Plan.model_validate_json(out)
    assert (code, answer.world_size, answer.fits, answer.room) == (0, 1, None, None)
    assert answer.resolved_spec["resources"]["accelerator"] == "gpu"
    assert "dp: auto counts as 1, the least; set --ranks for more" in answer.notes
    code, out, _ = run("plan", "spec.yaml", "--hardware", "H100", "--ranks", "3")
    assert code == 0
    assert "the layout and the batch use 2 of 3 ranks" in out
    # Without a device the spec is checked, and its memory estimated.
    code, out, _ = run("plan", "spec.yaml", "--offline")
    assert code == 0
    assert "memory is estimated for GPUs" in out


def test_a_plan_from_the_spec_alone_names_what_to_change(run: Run) -> None:
    fp32 = run("plan", "spec.yaml", "--hardware", "H100")
    assert fp32[0] == 0
    assert "no fp32 timings for H100; set training.precision=bf16" in fp32[1]
    code, out, err = run("plan", "spec.yaml", "--hardware", "H100", "--suggest")
    assert code == 1
    assert "layouts cannot be compared; set training.precision=bf16" in out
    assert "no layout can be suggested" in err
    code, out, _ = run(
        *("plan", "spec.yaml", "--hardware", "H100", "--suggest", "--json", "--ranks", "2"),
        *("--set", "training.precision=bf16"),
    )
    assert code == 0
    assert {entry.changes["parallel.dp"] for entry in Suggestions(**json.loads(out)).data}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["--set", "modl.preset=x"],
            2,
            "/modl: unknown field 'modl'; did you mean 'model'?",
        ),
        (
            ["--set", "model.preset=gpt-tyni"],
            2,
            "/model/preset: unknown preset 'gpt-tyni'; ",
        ),
        (["--set", "schedule.min_lr=1"], 2, "/schedule/min_lr: min_lr=1 is above"),
        (["--hardware", "h1000"], 2, "unknown hardware 'h1000'; did you mean 'H100'?"),
        (["--hardware", "abacus"], 2, "unknown hardware 'abacus'; known: A100"),
        (
            ["--hardware", "H100", "--ranks", "3", "--set", "parallel.dp=4"],
            2,
            "= 1 x 1 x 1 x 4 = 4 ranks, but there is room for 3",
        ),
        (
            [
                *("--hardware", "H100", "--set", "parallel.dp=100000"),
                *("--set", "training.global_batch_size=100000"),
            ],
            2,
            "/parallel: a plan lists at most 65536 ranks, and this one has 100000; lower",
        ),
        (
            ["--suggest", "--hardware", "H100", "--ranks", "100000"],
            2,
            "--ranks 100000: at most 65536",
        ),
        (["--suggest"], 1, "no device to suggest layouts for"),
        (
            [
                *("--hardware", "H100", "--set", "parallel.tp=16"),
                *("--set", "model.num_attention_heads=16", "--set", "model.head_dim=8"),
            ],
            1,
            "/parallel/tp: tp=16 ranks must share a node, and a node has 8 H100; lower tp",
        ),
        (
            ["--hardware", "H100", "--set", "model.preset=llama3-70b"],
            1,
            "and H100 has 80; no layouts are compared for fp32 on H100",
        ),
    ],
)
def test_what_is_wrong_with_a_spec_is_told_without_a_service(
    run: Run, arguments: list[str], code: int, words: str
) -> None:
    ended, _, err = run("plan", "spec.yaml", *arguments)
    assert ended == code
    assert words in err


def test_a_stack_that_no_longer_answers_counts_as_none(
    run: Run, monkeypatch: pytest.MonkeyPatch, service: FakeService
) -> None:
    gone = FakeService()
    gone.close()
    monkeypatch.setattr("service.client._RETRY_WAITS_S", ())

    def stale(url: str | None, token: str | None, data_dir: Path | None) -> Client:
        return Client(url or gone.url)

    monkeypatch.setattr("service.cli.commands.plan.connect_if_up", stale)
    assert run("plan", "spec.yaml")[0] == 0
    code, _, err = run("plan", "spec.yaml", "--url", gone.url)
    assert code == 1
    assert "no service answers at" in err
    # A service that is up and refuses has the last word.
    service.routes["POST /v1/plans"] = (422, {"title": "The spec is wrong"})
    assert run("plan", "spec.yaml", "--url", service.url)[0] == 1
    assert run("plan", "spec.yaml", "--url", service.url, "--offline")[0] == 0
