"""The same code on CUDA: equal to the CPU, without a host-device synchronisation in a
step.
"""

import gzip
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.optimizer.step_sums import SkipRule
from megatron_ray.reports import Report, StepReport
from megatron_ray.storage.storage import open_storage
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.profiling.recording import StepRecording
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_timer import StreamTimer
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.parity import GPT2, LLAMA, NoSaver, RandomDataset, make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses_and_norms(config: TrainConfig, kind: str) -> tuple[list[float], list[float]]:
    mesh = ParallelMesh.single(kind)
    model, optimizer = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 8, 0, 1, batch_maker(config, mesh)
    )
    reports: list[StepReport] = []

    def note(report: Report) -> None:
        assert isinstance(report, StepReport)
        reports.append(report)

    train(
        TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver()),
        Progress(),
        note,
        lambda: Command.CONTINUE,
    )
    assert [report.step for report in reports] == list(
        range(1, config.training.num_steps + 1)
    )
    for report in reports:
        assert sum(report.split_s.values()) == pytest.approx(report.step_s, rel=1e-6)
        assert min(report.split_s.values()) >= 0
    return [report.loss for report in reports], [report.grad_norm for report in reports]


LATENT = {name: value for name, value in LLAMA.items() if name != "num_query_groups"} | {
    "mla": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "mtp": {"num_layers": 2, "loss_coeff": 0.3},
}


@pytest.mark.parametrize("model", [LLAMA, GPT2, LATENT])
def test_fp32_equals_the_cpu(model: dict[str, Any]) -> None:
    config = make_config(model, {"dp": 1}, steps=20)
    cpu = losses_and_norms(config, "cpu")
    cuda = losses_and_norms(config, "cuda")
    np.testing.assert_allclose(cuda[0], cpu[0], rtol=1e-5)
    np.testing.assert_allclose(cuda[1], cpu[1], rtol=5e-5)


@pytest.mark.parametrize("model", [LLAMA, GPT2, LATENT])
def test_bf16_follows_the_cpu(model: dict[str, Any]) -> None:
    config = make_config(model, {"dp": 1}, steps=20, precision="bf16")
    np.testing.assert_allclose(
        losses_and_norms(config, "cuda")[0], losses_and_norms(config, "cpu")[0], rtol=1.5e-2
    )


@pytest.mark.parametrize("remainders", [False, True])
def test_offloaded_state_changes_no_loss_and_frees_the_device(remainders: bool) -> None:
    plain = make_config(LLAMA, {"dp": 1}, steps=20, precision="bf16")
    numbers = {"offload": True, "store_param_remainders": remainders}
    optimizer = plain.optimizer.model_copy(update=numbers)
    offloaded = plain.model_copy(update={"optimizer": optimizer})
    np.testing.assert_allclose(
        losses_and_norms(offloaded, "cuda"), losses_and_norms(plain, "cuda"), rtol=1e-3
    )
    allocated = []
    for config in (plain, offloaded):
        before = torch.cuda.memory_allocated()
        built = build(config, ParallelMesh.single("cuda"))
        allocated.append(torch.cuda.memory_allocated() - before)
        updated = sum(shard.pieces[-1].shard_range.stop for shard in built[1].shards)
        del built
    # Two moments and the main parameters.
    assert allocated[0] - allocated[1] >= 12 * updated


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
RECOMPUTE: list[dict[str, Any]] = [
    {"granularity": "full", "method": "uniform", "num_layers": 1},
    {"granularity": "selective", "modules": ["core_attention", "norm", "activation"]},
    {"granularity": "operations"},
]


def with_recompute(config: TrainConfig, recompute: dict[str, Any]) -> TrainConfig:
    fields = config.model_dump()
    fields["training"]["recompute"] = recompute
    return TrainConfig.from_mapping(fields)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputed_layers_drop_what_they_dropped(recompute: dict[str, Any]) -> None:
    config = make_config(LLAMA | DROPOUT, {"dp": 1}, steps=10)
    plain = losses_and_norms(config, "cuda")
    again = losses_and_norms(with_recompute(config, recompute), "cuda")
    np.testing.assert_allclose(again[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(again[1], plain[1], rtol=5e-5)


@pytest.mark.parametrize("recompute", [{}, *RECOMPUTE])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(
    precision: str, recompute: dict[str, Any]
) -> None:
    config = with_recompute(
        make_config(
            LLAMA | (DROPOUT if recompute else {}), {"dp": 1}, steps=4, precision=precision
        ),
        recompute,
    )
    mesh = ParallelMesh.single("cuda")
    model, optimizer = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 8, 0, 1, batch_maker(config, mesh)
    )
    for step in range(3):
        batches = loader.step(8 * step)
        if step == 2:  # the first steps compile and allocate
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss = forward_backward(model, mesh, batches)
            stats = reduce_step(
                model,
                optimizer,
                mesh,
                loss,
                sum(batch.num_tokens for batch in batches),
                skip_rule=SkipRule.IF_NOT_FINITE,
            )
            scale_and_clip(optimizer, stats, 1.0)
            optimizer.step(1e-3, stats.skip)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_deterministic_runs_are_bit_equal() -> None:
    fields = make_config(LLAMA, {"dp": 1}, steps=10, precision="bf16").model_dump()
    fields["training"]["deterministic"] = True
    config = TrainConfig.from_mapping(fields)
    torch.use_deterministic_algorithms(True)
    try:
        assert losses_and_norms(config, "cuda") == losses_and_norms(config, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)


def test_parts_of_a_step_are_those_of_the_stream() -> None:
    matrix = torch.ones(4096, 4096, device="cuda")
    timer = StreamTimer()
    for _ in range(3):
        time.sleep(0.02)  # the stream waits for its host
        timer.mark("data")
        for _ in range(20):
            matrix @ matrix
        timer.mark("forward")
        matrix @ matrix
        timer.mark("backward")
        pending = timer.finish()
        torch.cuda.synchronize()
        times = pending.read()
    assert times.parts_s["data"] >= 0.015
    assert times.parts_s["forward"] > 3 * times.parts_s["backward"] > 0
    assert sum(times.parts_s.values()) == pytest.approx(times.total_s, rel=1e-6)


def test_marks_in_the_stream_cost_little() -> None:
    """A step of 16 microbatches with 8 waits in each pass: its host time for marks."""
    timer = StreamTimer()
    costs = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(16 * 2 * 8):
            timer._mark_wait(begins=True)
            timer._mark_wait(begins=False)
        pending = timer.finish()
        costs.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        pending.read()
    # About 2 us for a mark.
    assert min(costs) < 512 * 20e-6


def test_a_profile_has_the_kernels_and_the_allocators_history(tmp_path: Path) -> None:
    recording = StepRecording(torch.device("cuda"))
    recording.begin_step(7)
    matrix = torch.ones(1024, 1024, device="cuda")
    matrix @ matrix
    recording.end_step()
    recording.stop()
    trace, memory = recording.write(open_storage(str(tmp_path)), 0)
    with gzip.open(tmp_path / trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert any(event.get("name") == "step 7" for event in events)
    snapshot = pickle.loads((tmp_path / memory).read_bytes())
    assert snapshot["segments"]
    assert any(snapshot["device_traces"])
    first = recording.operators()[0]
    assert first["name"] == "aten::mm"
    assert first["seconds"] > 0
