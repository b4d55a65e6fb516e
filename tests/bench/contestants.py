"""Programs that train the reference model: this library, a plain torch loop over
Hugging Face transformers, and megatron-core (in a file of its own). Run as one child
process per rank, they take a number of steps per line of stdin and answer with losses,
norms and seconds.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ray.distributed.device import MallocTuning
from tests.bench import reference

Step = Callable[[np.ndarray, bool], tuple[float, float] | None]
"""(tokens [samples, sequence + 1] of the global batch, whether the gradient norm has to
be exact) -> loss, gradient norm before clipping; None where a rank does not know them.
"""


@dataclass(frozen=True)
class Terms:
    """What both sides of a comparison have in common."""

    precision: str
    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro_batch: int = reference.MICRO_BATCH

    @property
    def world_size(self) -> int:
        """One of the axes, so ranks count along it."""
        return self.dp * self.tp * self.pp

    def microbatches(self, rows: np.ndarray, rank: int) -> list[np.ndarray]:
        """This rank's, in order."""
        if self.dp > 1:
            rows = np.split(rows, self.dp)[rank]
        return [
            rows[start : start + self.micro_batch]
            for start in range(0, len(rows), self.micro_batch)
        ]

    @property
    def checked(self) -> int:
        """Steps whose losses are compared before any time is taken."""
        return len(reference.LOSSES) if self.precision == "fp32" else 4

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))


def ours(terms: Terms, rank: int, *, compiled: bool = False) -> Step:
    from megatron_ray.config.train_config import TrainConfig
    from megatron_ray.data.loader import BatchMaker
    from megatron_ray.distributed.mesh import ParallelMesh, World
    from megatron_ray.optimizer.finalize_grads import scale_and_clip
    from megatron_ray.parallel_dims import ParallelDims
    from megatron_ray.training.session import build
    from megatron_ray.training.step import forward_backward, reduce_step
    from tests.support.hf_names import decoder_logical, fill

    degrees = {"dp": terms.dp, "tp": terms.tp, "pp": terms.pp}
    config = TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": reference.LAYERS,
                "hidden_size": reference.HIDDEN,
                "num_attention_heads": reference.HEADS,
                "ffn_hidden_size": reference.FFN,
                "vocab_size": reference.VOCABULARY,
            },
            "parallel": degrees | ({"schedule": "zb-h1"} if terms.pp > 1 else {}),
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "seq_length": reference.SEQUENCE,
                "micro_batch_size": terms.micro_batch,
                "global_batch_size": reference.GLOBAL_BATCH,
                "steps": 1,
                "precision": terms.precision,
                "compile": "blocks" if compiled else "none",
            },
            "optimizer": {"lr": reference.LEARNING_RATE},
        }
    )
    mesh = ParallelMesh.create(
        ParallelDims(dp=terms.dp, tp=terms.tp, pp=terms.pp),
        World(rank, terms.world_size, rank, "cpu"),
    )
    model, optimizer = build(config, mesh, initialise=False)
    fill(model, optimizer, decoder_logical(reference.weights(), config.model))
    make_batch = BatchMaker(mesh.device)

    def step(rows: np.ndarray, exact: bool) -> tuple[float, float]:
        batches = [make_batch(part) for part in terms.microbatches(rows, rank)]
        loss = forward_backward(model, mesh, batches)
        stats = reduce_step(
            model, optimizer, mesh, loss, sum(batch.num_tokens for batch in batches)
        )
        scale_and_clip(optimizer, stats, 1.0)
        optimizer.step(reference.LEARNING_RATE)
        loss_sum, tokens, squared_norm = stats.values.tolist()
        return loss_sum / tokens, squared_norm**0.5 / tokens

    return step


def transformers(terms: Terms, rank: int, *, compiled: bool = False) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        vocab_size=reference.VOCABULARY,
        hidden_size=reference.HIDDEN,
        intermediate_size=reference.FFN,
        num_hidden_layers=reference.LAYERS,
        num_attention_heads=reference.HEADS,
        num_key_value_heads=reference.HEADS,
        max_position_embeddings=reference.SEQUENCE,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **options,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(reference.weights(), strict=False)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=reference.LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
    )

    def microbatch_loss(part: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=terms.precision == "bf16"):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), part[:, 1:].flatten()
        )

    if compiled:
        microbatch_loss = torch.compile(microbatch_loss)

    def step(rows: np.ndarray, exact: bool) -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        microbatches = [torch.from_numpy(part) for part in terms.microbatches(rows, rank)]
        for part in microbatches:
            loss = microbatch_loss(part) / len(microbatches)
            loss.backward()
            total += loss.item()
        # The library's own fp32 norm is off by up to 1e-4 on matrices of this size; the
        # exact one is what is compared.
        squares = [
            parameter.grad.double().square().sum()
            for parameter in model.parameters()
            if exact and parameter.grad is not None
        ]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total, norm

    return step


def megatron_core(terms: Terms, rank: int, *, compiled: bool = False) -> Step:
    os.environ["TORCHDYNAMO_DISABLE"] = str(
        int(not compiled)
    )  # it decorates functions with the compiler wherever it is
    from tests.bench import megatron_core

    return megatron_core.program(terms, rank, compiled=compiled)


PROGRAMS: dict[str, Callable[[Terms, int], Step]] = {
    "ours": ours,
    "ours-compiled": partial(ours, compiled=True),
    "transformers": transformers,
    "transformers-compiled": partial(transformers, compiled=True),
    "megatron-core": megatron_core,
    "megatron-core-compiled": partial(megatron_core, compiled=True),
}


def main() -> None:
    name = sys.argv[1]
    given = Terms(**json.loads(sys.argv[2]))
    rank = int(sys.argv[3])
    meeting_point = sys.argv[4]
    torch.set_num_threads(1)
    if given.world_size > 1 or name.startswith("megatron-core"):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting_point}",
            rank=rank,
            world_size=given.world_size,
        )
    step = PROGRAMS[name](given, rank)
    number = 0
    memory = MallocTuning() if name.startswith("ours") else None  # as every rank has it
    for line in sys.stdin:
        losses = []
        norms = []
        seconds = []
        before = time.process_time()
        for _ in range(int(line)):
            rows = reference.samples(number)
            start = time.perf_counter()
            known = step(rows, number < given.checked)
            if memory is not None:
                memory.trim_if_grown()
            seconds.append(time.perf_counter() - start)
            if known is not None:
                losses.append(known[0])
                norms.append(known[1])
            number += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        used = time.process_time() - before
        print(
            json.dumps(
                {
                    "losses": losses,
                    "norms": norms,
                    "seconds": seconds,
                    "cpu_s": used,
                    "peak_mb": peak,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
