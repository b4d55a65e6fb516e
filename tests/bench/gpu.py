"""Training speed on one CUDA device, through the library alone: whole steps with a real optimizer, no recompute.

MFU counts 6 N + 12 L H S per token against the chip's dense bf16 peak; the figure with causal halving stands beside it.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_ray import device
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import BatchMaker
from megatron_ray.flops import flops_per_token
from megatron_ray.mesh import ParallelMesh
from megatron_ray.optimizer.finalize_grads import finalize_grads, scale_and_clip
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward

_LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "position_embedding": "rope"}
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    # name: (shape, micro batch, goal in percent of the bf16 peak)
    "0.1B": (
        _LLAMA | {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_hidden_size": 2048, "vocab_size": 50304},
        8,
        40,
    ),
    "1B": (
        _LLAMA | {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 8192, "vocab_size": 128256},
        4,
        60,
    ),
}
SEQUENCE, STEPS, WARMUP, MICROBATCHES = 4096, 10, 3, 2


def run() -> Iterator[dict[str, Any]]:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure", file=sys.stderr)
        return
    for name, (shape, micro_batch, goal) in MODELS.items():
        yield measure(name, shape, micro_batch, goal)


def measure(name: str, shape: dict[str, Any], micro_batch: int, goal: float) -> dict[str, Any]:
    """Median step time over STEPS steps after WARMUP."""
    config = TrainConfig.from_mapping(
        {
            "model": shape,
            "parallel": {"dp": 1},
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "seq_length": SEQUENCE,
                "micro_batch_size": micro_batch,
                "global_batch_size": micro_batch * MICROBATCHES,
                "steps": STEPS,
                "precision": "bf16",
            },
            "optimizer": {"lr": 3e-4, "weight_decay": 0.1},
        }
    )
    mesh = ParallelMesh.single("cuda")
    torch.cuda.reset_peak_memory_stats()
    model, optimizer = build(config, mesh)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.model.vocabulary, (micro_batch * MICROBATCHES, SEQUENCE + 1))
    batches = [BatchMaker(mesh.device)(rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)]
    seconds = []
    for step in range(WARMUP + STEPS):
        device.synchronize(mesh.device)
        start = time.perf_counter()
        loss = forward_backward(model, mesh, batches)
        stats = finalize_grads(model, optimizer, mesh, loss, sum(batch.num_tokens for batch in batches))
        scale_and_clip(optimizer, stats, 1.0)
        optimizer.step(3e-4)
        device.synchronize(mesh.device)
        if step >= WARMUP:
            seconds.append(time.perf_counter() - start)
    rate = rows.shape[0] * SEQUENCE / statistics.median(seconds)
    peak = device.peak_flops(mesh.device) or float("nan")
    attention = 12 * config.model.num_layers * config.model.hidden_size * SEQUENCE
    flops = flops_per_token(config.model, SEQUENCE)
    return {
        "bench": "gpu",
        "case": f"{name}-bf16",
        "value": round(100 * rate * flops / peak, 1),
        "unit": "percent of the dense bf16 peak",
        "baseline": None,
        "goal": goal,
        "causal_halved": round(100 * rate * (flops - attention / 2) / peak, 1),
        "tokens_per_s": round(rate),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "micro_batch": micro_batch,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
