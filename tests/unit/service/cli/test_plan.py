"""`plan` and its suggestions, for people and as JSON."""

import pytest

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
        "resolved_spec": {"parallel": {"tp": 2, "dp": 1}},
        "world_size": 2,
        "ranks": [{"rank": 0, "island": 0, "coordinates": {"tp": 0}}],
        "memory": {"rank": 0, "parameters_bytes": 4 << 20},
        "communication": [
            {"axis": "tp", "kind": "all_reduce", "operations": 12, "bytes": 3 << 20}
        ],
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
    assert "4.0 MiB" in out
    assert "tp all-reduce" in out
    assert "memory on the most loaded rank (rank 0)" in out
    assert "3.0 MiB in 12 calls" in out
    assert "on H100, estimated: 1.50 s" in out
    assert "MFU 41.0 %" in out
    assert "matmuls" in out
    assert "800.0 ms" in out
    assert "bubble" not in out
    assert code == (0 if fits else 1)
    assert ("/parallel: 2 ranks, but there is room for 1; add nodes" in err) is not fits
    assert service.requests[0][1]["name"] == "tiny"


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
