"""The estimate of a step's time: near published runs, and in the right order where the
order is known.
"""

from typing import Any

import pytest

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline
from megatron_ray.planning.flops import matmul_parameters
from megatron_ray.planning.hardware import HARDWARE, hardware_named
from megatron_ray.planning.step_time.estimate import StepTime, step_time
from megatron_ray.planning.work import stage_work
from megatron_ray.sharding.parameters import logical_parameters
from megatron_ray.validation import check
from tests.bench.plan import FILE, GOAL, TOLERANCE, load

FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}
SELECTIVE = {"granularity": "selective", "modules": ("norm", "activation")}
# 126 layers and the two ends make 128 places.
LAYOUTS = {1: "E" + "t" * 7 + "|" + "(tttttttt|)*14" + "t" * 7 + "L", 4: "Et|(tt|)*62tL"}


def plan(
    model: str,
    parallel: dict[str, Any],
    *,
    batch: int,
    recompute: dict[str, Any] | None = None,
    hardware: str = "H100",
    optimizer: dict[str, Any] | None = None,
    **training: Any,
) -> StepTime:
    fields = {
        "model": {"preset": model},
        "parallel": {"sequence_parallel": parallel.get("tp", 1) > 1} | parallel,
        "data": {"train": [{"path": "unused"}]},
        "training": {
            "seq_length": 8192,
            "global_batch_size": batch,
            "steps": 1,
            "precision": "bf16",
        }
        | {"recompute": recompute or {}}
        | training,
        "optimizer": {"lr": 1e-4} | (optimizer or {}),
    }
    config = TrainConfig.from_mapping(fields)
    assert check.find_problems(config) == []
    estimate = step_time(config, HARDWARE[hardware])
    assert estimate is not None
    return estimate


def test_published_runs_are_met_by_the_constants_of_their_chip() -> None:
    runs = load()
    assert len(runs) >= 15
    assert FILE.exists()
    ratios = [
        run.parts.step_time(HARDWARE[run.chip].efficiencies[run.precision]).step_s
        / run.step_s
        for run in runs
    ]
    assert sum(
        1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE for ratio in ratios
    ) >= GOAL * len(runs)


def test_fp8_is_counted_where_a_device_has_its_products() -> None:
    layout = {"tp": 8, "dp": 8}

    def products(hardware: str, recipe: str | None) -> float:
        fp8 = None if recipe is None else {"recipe": recipe}
        return plan("llama3-8b", layout, batch=64, hardware=hardware, fp8=fp8).products_s

    for hardware, recipe in (("H100", "delayed"), ("H200", "blockwise"), ("B200", "mxfp8")):
        assert products(hardware, recipe) < 0.5 * products(hardware, None)
    # Emulated.
    for hardware, recipe in (("A100", "current"), ("H100", "mxfp8"), ("B200", "blockwise")):
        assert products(hardware, recipe) == products(hardware, None)
    assert products("CPU", "current") > 5 * products("CPU", None)


def test_fp16_is_as_quick_as_bf16_and_short_gradients_are_sent_sooner() -> None:
    layout = {"tp": 8, "dp": 8}
    bf16 = plan("llama3-8b", layout, batch=64)
    assert plan("llama3-8b", layout, batch=64, precision="fp16") == bf16
    short = plan("llama3-8b", layout, batch=64, grad_reduce_in_fp32=False)
    assert short.step_s < bf16.step_s
    wide = plan("llama3-8b", layout, batch=64, fp32_residual_connection=True)
    assert wide.step_s > bf16.step_s


def test_gathers_in_the_forward_pass_take_time_only_where_they_are_longer() -> None:
    layout = {"tp": 8, "dp": 8}
    overlap = {"overlap_param_gather": True}
    plain = plan("llama3-8b", layout, batch=64)
    overlapped = plan("llama3-8b", layout | overlap, batch=64)
    assert overlapped.update_s < plain.update_s
    assert overlapped.step_s - overlapped.update_s == plain.step_s - plain.update_s


def test_tokens_that_are_sent_during_products_take_time_only_where_they_are_longer() -> (
    None
):
    layout = {"tp": 8, "dp": 8}
    overlap = {"tp_comm_overlap": True}
    for hardware in ("H100", "CPU"):
        plain = plan("llama3-8b", layout, batch=64, hardware=hardware)
        overlapped = plan("llama3-8b", layout | overlap, batch=64, hardware=hardware)
        assert overlapped.communication_s < 0.45 * plain.communication_s
        for part in ("products_s", "attention_s", "memory_s", "update_s"):
            assert getattr(overlapped, part) == getattr(plain, part)
    # Between nodes products are shorter than the transfers.
    far = {"tp": 32, "dp": 8}
    plain = plan("llama3-405b", far, batch=64)
    overlapped = plan("llama3-405b", far | overlap, batch=64)
    assert overlapped.communication_s > 0.5 * plain.communication_s


def test_interleaving_makes_405b_quicker_than_1f1b() -> None:
    plain, interleaved = (
        plan(
            "llama3-405b",
            {"tp": 8, "pp": 16, "vpp": vpp, "dp": 4, "layout": LAYOUTS[vpp]},
            batch=256,
        )
        for vpp in (1, 4)
    )
    assert interleaved.step_s < plain.step_s
    assert interleaved.bubble_s < plain.bubble_s / 3
    assert interleaved.mfu > plain.mfu
    assert interleaved.model_flops == plain.model_flops


def test_tensor_parallelism_belongs_inside_a_node() -> None:
    inside = plan("llama3-70b", {"tp": 8, "pp": 4, "dp": 2}, batch=128)
    across = plan("llama3-70b", {"tp": 16, "pp": 2, "dp": 2}, batch=128)
    assert inside.step_s < across.step_s
    assert across.communication_s > 2 * inside.communication_s


def test_recomputing_less_is_quicker() -> None:
    parallel = {"tp": 8, "pp": 4, "dp": 2}
    none, selective, full = (
        plan("llama3-70b", parallel, batch=128, recompute=how).step_s
        for how in (None, SELECTIVE, FULL)
    )
    assert none < selective < full
    assert full / none == pytest.approx(4 / 3, rel=0.1)


def test_longer_steps_hide_the_bubble_and_faster_devices_are_faster() -> None:
    few, many = (
        plan("llama3-70b", {"tp": 8, "pp": 8, "dp": 1}, batch=batch) for batch in (8, 128)
    )
    assert few.bubble_share > 0.4
    assert many.bubble_share < 0.06
    chips = [
        plan("llama3-8b", {"tp": 2, "dp": 4}, batch=32, hardware=name).step_s
        for name in ("A100", "H100", "H200", "B200")
    ]
    assert chips == sorted(chips, reverse=True)


@pytest.mark.parametrize("model", ["llama3-8b", "deepseek-v2-lite", "deepseek-v3"])
def test_products_of_all_ranks_are_those_of_the_model(model: str) -> None:
    """But for routers, which are small, and for what ranks do alike where tokens are
    not cut over them.
    """

    def products(**parallel: Any) -> float:
        batch = {
            "seq_length": 8192,
            "global_batch_size": 1,
            "steps": 1,
            "precision": "bf16",
        }
        fields = {
            "model": {"preset": model, "vocab_multiple": 1},
            "parallel": {"dp": 1} | parallel,
            "data": {"train": [{"path": "unused"}]},
        }
        config = TrainConfig.from_mapping(
            fields | {"training": batch, "optimizer": {"lr": 1e-4}}
        )
        return (
            config.parallel.tp
            * stage_work(config, plan_pipeline(config).stages_of(0)[0]).products
        )

    whole = ModelConfig.model_validate({"preset": model})
    mixtures = [
        whole.experts_on(layer) for layer in range(whole.num_layers + whole.num_mtp_layers)
    ]
    routers = whole.hidden_size * sum(
        moe.num_experts for moe in mixtures if moe is not None
    )
    expected = 6.0 * 8192 * (matmul_parameters(whole) - routers)
    assert products() == products(tp=4, sequence_parallel=True, etp=1) == expected
    assert (products(tp=4, etp=1) > expected) == (whole.mla is not None)


@pytest.mark.parametrize(
    "parallel", [{"dp": 32}, {"tp": 4, "dp": 8}, {"dp": 32, "zero": 3}]
)
def test_orthogonalization_is_shared_by_all_ranks(parallel: dict[str, Any]) -> None:
    def update_s(**muon: Any) -> float:
        optimizer = {"name": "muon", "muon": muon}
        return plan("llama3-8b", parallel, batch=32, optimizer=optimizer).update_s

    config = ModelConfig.model_validate({"preset": "llama3-8b", "vocab_size": 2})
    flops = 0
    for parameter in logical_parameters(config):
        if parameter.is_matrix:
            small, large = sorted(parameter.shape)
            flops += 5 * (4 * small**2 * large + 2 * small**3)
    even = flops / (0.65 * 989e12 * 32)
    once = update_s(precision="bf16")
    twice = update_s(precision="bf16", steps=10)
    assert even < twice - once < 1.5 * even
    assert update_s() > once


def test_parts_add_up() -> None:
    estimate = plan("llama3-8b", {"tp": 2, "pp": 2, "dp": 2, "zero": 3}, batch=32)
    parts = (
        estimate.products_s,
        estimate.attention_s,
        estimate.memory_s,
        estimate.communication_s,
        estimate.bubble_s,
        estimate.update_s,
    )
    assert sum(parts) == pytest.approx(estimate.step_s)
    assert estimate.tokens_per_s == pytest.approx(32 * 8192 / estimate.step_s)
    assert estimate.mfu == pytest.approx(
        estimate.model_flops / (estimate.step_s * 8 * 989e12)
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100"),
        ("nvidia-h200-141gb", "H200"),
        ("A100-40G", "A100"),
        ("cpu", "CPU"),
        ("H1000", None),
        ("", None),
        (None, None),
    ],
)
def test_devices_are_known_by_what_ray_calls_them(
    text: str | None, name: str | None
) -> None:
    hardware = hardware_named(text)
    assert (hardware.name if hardware is not None else None) == name
