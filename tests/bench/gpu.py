"""Training speed on one CUDA device, through the library alone: whole steps with a real
optimizer, no recompute.

MFU counts 6 N + 12 L H S per token against the chip's dense bf16 peak; the figure with
causal halving stands beside it.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import BatchMaker
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.planning.flops import flops_per_token
from megatron_ray.sharding.parameters import logical_parameters
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward, reduce_step

_LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "position_embedding": "rope"}
MODELS: dict[str, tuple[dict[str, Any], int, int | None]] = {
    # name: (shape, micro batch, goal in percent of the bf16 peak)
    "0.1B": (
        _LLAMA
        | {
            "num_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "ffn_hidden_size": 2048,
            "vocab_size": 50304,
        },
        8,
        40,
    ),
    "1B": (
        _LLAMA
        | {
            "num_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "ffn_hidden_size": 8192,
            "vocab_size": 128256,
        },
        4,
        60,
    ),
    "8B": ({"preset": "llama3-8b"}, 1, None),
}
SEQUENCE = 4096
STEPS = 10
WARMUP = 3
MICROBATCHES = 2
CURVE = {"preset": "gpt-tiny", "vocab_size": 512}
CURVE_STEPS = 12
CURVE_SEQUENCE = 256


def run() -> Iterator[dict[str, Any]]:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure", file=sys.stderr)
        return
    yield loss_curve()
    for name, (shape, micro_batch, goal) in MODELS.items():
        needed = state_bytes(shape)
        there = torch.cuda.get_device_properties(0).total_memory
        if needed >= there:
            print(
                f"{name}: weights, gradients and AdamW take {needed / 2**30:.0f} GiB, the "
                f"device has {there / 2**30:.0f}",
                file=sys.stderr,
            )
            continue
        yield measure(name, shape, micro_batch, goal)


def training_config(
    shape: dict[str, Any], sequence: int, micro_batch: int, steps: int
) -> TrainConfig:
    """bf16 on one rank, as everywhere in this bench."""
    batch = {
        "micro_batch_size": micro_batch,
        "global_batch_size": micro_batch * MICROBATCHES,
    }
    return TrainConfig.from_mapping(
        {
            "model": shape,
            "parallel": {"dp": 1},
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "seq_length": sequence,
                "steps": steps,
                "precision": "bf16",
                **batch,
            },
            "optimizer": {"lr": 3e-4, "weight_decay": 0.1},
        }
    )


def state_bytes(shape: dict[str, Any]) -> int:
    """bf16 weights, fp32 gradients, and fp32 weights with both moments."""
    model = training_config(shape, SEQUENCE, 1, 1).model
    return (2 + 4 + 12) * sum(
        parameter.num_elements for parameter in logical_parameters(model)
    )


def steps_on(
    config: TrainConfig, mesh: ParallelMesh, rows: list[Any]
) -> Iterator[tuple[float, float]]:
    """Whole steps over the same samples: mean loss, and seconds until the device has
    nothing left to do.
    """
    model, optimizer = build(config, mesh)
    batches = [BatchMaker(mesh.device)(row) for row in rows]
    tokens = sum(batch.num_tokens for batch in batches)
    while True:
        device.synchronize(mesh.device)
        start = time.perf_counter()
        loss = forward_backward(model, mesh, batches)
        stats = reduce_step(model, optimizer, mesh, loss, tokens)
        scale_and_clip(optimizer, stats, 1.0)
        optimizer.step(3e-4)
        device.synchronize(mesh.device)
        yield float(loss) / tokens, time.perf_counter() - start


def random_rows(vocabulary: int, micro_batch: int, sequence: int) -> list[Any]:
    """Samples of one step, a micro batch each."""
    rows = np.random.default_rng(0).integers(
        0, vocabulary, (micro_batch * MICROBATCHES, sequence + 1)
    )
    return [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]


def loss_curve() -> dict[str, Any]:
    """The same bf16 run from the same seed on both kinds of device."""
    config = training_config(CURVE, CURVE_SEQUENCE, 4, CURVE_STEPS)
    rows = random_rows(config.model.vocabulary, 4, CURVE_SEQUENCE)
    both = [
        itertools.islice(steps_on(config, ParallelMesh.single(kind), rows), CURVE_STEPS)
        for kind in ("cuda", "cpu")
    ]
    curves = [[loss for loss, _ in steps] for steps in both]
    return {
        "bench": "gpu",
        "case": "loss-curve-bf16",
        "value": round(
            max(abs(there - here) for there, here in zip(*curves, strict=True)), 5
        ),
        "unit": f"largest distance between the {CURVE_STEPS} losses on the GPU and on the CPU",
        "baseline": None,
        "goal": 1.5e-2,
        "first_and_last": [round(curves[0][0], 4), round(curves[0][-1], 4)],
    }


def measure(
    name: str, shape: dict[str, Any], micro_batch: int, goal: float | None
) -> dict[str, Any]:
    """Median step time over STEPS steps after WARMUP."""
    config = training_config(shape, SEQUENCE, micro_batch, STEPS)
    mesh = ParallelMesh.single("cuda")
    torch.cuda.reset_peak_memory_stats()
    rows = random_rows(config.model.vocabulary, micro_batch, SEQUENCE)
    seconds = [
        taken
        for _, taken in itertools.islice(
            steps_on(config, mesh, rows), WARMUP, WARMUP + STEPS
        )
    ]
    rate = micro_batch * MICROBATCHES * SEQUENCE / statistics.median(seconds)
    peak = device.peak_flops(mesh.device)

    def share(flops: float) -> float | None:
        return None if peak is None else round(100 * rate * flops / peak, 1)

    attention = 12 * config.model.num_layers * config.model.hidden_size * SEQUENCE
    flops = flops_per_token(config.model, SEQUENCE)
    return {
        "bench": "gpu",
        "case": f"{name}-bf16",
        "value": share(flops),
        "unit": "percent of the dense bf16 peak",
        "baseline": None,
        "goal": goal,
        "causal_halved": share(flops - attention / 2),
        "tokens_per_s": round(rate),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "micro_batch": micro_batch,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
