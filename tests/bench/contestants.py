"""Two programs that train the reference model on one rank and one thread: this library, and a plain torch loop over Hugging Face
transformers. Run as a child process, they take a number of steps per line of stdin and answer with losses, norms and seconds."""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from tests.bench import reference

Step = Callable[[np.ndarray, int], tuple[float, float]]
"""(tokens [samples, sequence + 1], number of the step from 0) -> loss, gradient norm."""


def ours(precision: str) -> Step:
    from megatron_ray.config.train_config import TrainConfig
    from megatron_ray.data.loader import BatchMaker
    from megatron_ray.mesh import ParallelMesh
    from megatron_ray.optimizer.finalize_grads import finalize_grads, scale_and_clip
    from megatron_ray.training.session import build
    from megatron_ray.training.step import forward_backward
    from tests.unit.megatron_ray.models.hf_names import fill, llama_logical

    config = TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": reference.LAYERS,
                "hidden_size": reference.HIDDEN,
                "num_attention_heads": reference.HEADS,
                "ffn_hidden_size": reference.FFN,
                "vocab_size": reference.VOCABULARY,
            },
            "parallel": {"dp": 1},
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "seq_length": reference.SEQUENCE,
                "micro_batch_size": reference.MICRO_BATCH,
                "global_batch_size": reference.GLOBAL_BATCH,
                "steps": 1,
                "precision": precision,
            },
            "optimizer": {"lr": reference.LEARNING_RATE},
        }
    )
    mesh = ParallelMesh.single()
    model, optimizer = build(config, mesh, initialise=False)
    fill(model, optimizer, llama_logical(reference.weights(), config.model))

    def step(rows: np.ndarray, number: int) -> tuple[float, float]:
        batches = [BatchMaker(mesh.device)(rows[i : i + reference.MICRO_BATCH]) for i in range(0, len(rows), reference.MICRO_BATCH)]
        loss = forward_backward(model, mesh, batches)
        stats = finalize_grads(model, optimizer, mesh, loss, sum(batch.num_tokens for batch in batches))
        scale_and_clip(optimizer, stats, 1.0)
        optimizer.step(reference.LEARNING_RATE)
        loss_sum, tokens, squared_norm = stats.values.tolist()
        return loss_sum / tokens, squared_norm**0.5 / tokens

    return step


def transformers(precision: str) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

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
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(reference.weights(), strict=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=reference.LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def step(rows: np.ndarray, number: int) -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        microbatches = torch.from_numpy(rows).split(reference.MICRO_BATCH)
        for part in microbatches:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(input_ids=part[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) / len(microbatches)
            loss.backward()
            total += loss.item()
        # The library's own fp32 norm is off by up to 1e-4 on matrices of this size; the exact one is what is compared.
        squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if number < 12 and parameter.grad is not None]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total, norm

    return step


def main() -> None:
    name, precision = sys.argv[1:]
    torch.set_num_threads(1)
    step = {"ours": ours, "transformers": transformers}[name](precision)
    number = 0
    for line in sys.stdin:
        losses, norms, seconds = [], [], []
        for _ in range(int(line)):
            rows = reference.samples(number)
            start = time.perf_counter()
            loss, norm = step(rows, number)
            seconds.append(time.perf_counter() - start)
            losses.append(loss)
            norms.append(norm)
            number += 1
        print(json.dumps({"losses": losses, "norms": norms, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
