"""Measures whether activations move as much in wide models as in narrow ones.

    python -m megatron_ray.training.coordinate_check --widths 64 128 256 512 --json

Owns: models of several widths, the measurement and its verdict. Must not know: how the result
is shown.

A few steps on one batch change the activations. Under muP the change does not depend on the
width; under the standard parametrization it grows (Tensor Programs V, appendix D).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.gpt import GPT
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.training.origin import raise_for
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward, reduce_step
from megatron_ray.validation.check import find_problems

HEAD_WIDTH = 16
"""Width of all models' heads: wider models have more of them."""
FLAT = 0.4
"""Largest growth of a flat coordinate, as a power of the width."""
_VOCABULARY = 257
_SAMPLES = 4
_LENGTH = 64
_DEFAULTS = {
    "model": {"preset": "gpt-tiny", "vocab_size": _VOCABULARY},
    "optimizer": {"lr": 0.001},
}


@dataclass(frozen=True)
class Coordinate:
    """The change of one activation, by the width of the model."""

    name: str
    """`embedding`, `layers.0` ..., `final_norm` or `logits`."""
    changes: tuple[float, ...]
    """Root mean square of the differences to the activations before the first step, by
    width."""
    growth: float
    """Power of the width with which the change grows; 0 is flat."""


@dataclass(frozen=True)
class CoordinateCheck:
    """The coordinates under muP and under the standard parametrization."""

    widths: tuple[int, ...]
    steps: int
    mup: tuple[Coordinate, ...]
    standard: tuple[Coordinate, ...]
    is_flat: bool
    """Whether no coordinate under muP grows or shrinks with the width."""


def check_coordinates(
    fields: Mapping[str, Any], widths: Sequence[int], steps: int, seeds: int
) -> CoordinateCheck:
    """Trains models of every width with the `model` and `optimizer` of a spec's fields.

    The narrowest one is muP's base model. Changes are means over `seeds` models. Raises
    ValueError for a model that cannot be widened, and when an activation does not change.
    """
    base = min(widths)
    mup: dict[int, dict[str, float]] = {}
    standard: dict[int, dict[str, float]] = {}
    for width in sorted(widths):
        mup[width] = _mean_changes(_config(fields, width, base), steps, seeds)
        standard[width] = _mean_changes(_config(fields, width, None), steps, seeds)
    coordinates = _coordinates(mup)
    return CoordinateCheck(
        tuple(sorted(widths)),
        steps,
        coordinates,
        _coordinates(standard),
        all(abs(coordinate.growth) <= FLAT for coordinate in coordinates),
    )


def _config(fields: Mapping[str, Any], width: int, base: int | None) -> TrainConfig:
    """Returns a spec of a small model of this width, with muP if `base` is a width."""
    if width % HEAD_WIDTH:
        raise ValueError(f"width {width} is no multiple of {HEAD_WIDTH}, a head's width")
    model = ModelConfig.model_validate(fields["model"])
    if model.mla is not None:
        raise ValueError("models with mla cannot be checked; leave it out")
    heads = width // HEAD_WIDTH
    heads_per_group = model.num_attention_heads // model.kv_heads
    if heads % heads_per_group:
        heads_per_group = 1
    factor = width / model.hidden_size
    wider = model.model_dump() | {
        "preset": None,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_query_groups": heads // heads_per_group,
        "head_dim": HEAD_WIDTH,
        "ffn_hidden_size": round(model.ffn_width * factor),
        "vocab_size": _VOCABULARY,
        "max_sequence_length": _LENGTH,
        "mtp": None,
        "mup": None,
    }
    if model.moe is not None:
        wider["moe"] |= _wider_experts(model.moe, factor)
    if base is not None:
        wider["mup"] = {"base_hidden_size": base}
    # Groups name layers that the small model may not have, switches steps.
    optimizer = {**fields["optimizer"], "groups": (), "freeze": (), "switches": ()}
    optimizer["weight_decay_schedule"] = None
    config = TrainConfig.from_mapping(
        {
            "model": wider,
            "optimizer": optimizer,
            "data": {"train": [{"path": "none"}], "tokenizer": {"kind": "bytes"}},
            "training": {
                "seq_length": _LENGTH,
                "micro_batch_size": _SAMPLES,
                "global_batch_size": _SAMPLES,
                "steps": 1,
            },
        }
    )
    raise_for(find_problems(config))
    return config


def _wider_experts(moe: MoEConfig, factor: float) -> dict[str, int]:
    widths = {}
    for name in ("ffn_hidden_size", "shared_expert_ffn_hidden_size"):
        width = getattr(moe, name)
        if width is not None:
            widths[name] = round(width * factor)
    return widths


def _mean_changes(config: TrainConfig, steps: int, seeds: int) -> dict[str, float]:
    """Returns the change of every activation, as a mean over models."""
    total: dict[str, float] = {}
    for seed in range(seeds):
        for name, change in _changes(config, steps, seed).items():
            total[name] = total.get(name, 0.0) + change / seeds
    return total


def _changes(config: TrainConfig, steps: int, seed: int) -> dict[str, float]:
    """Returns how much every activation of a batch changes while a model trains on it."""
    training = config.training.model_copy(update={"seed": seed})
    config = config.model_copy(update={"training": training})
    mesh = ParallelMesh.single()
    model, optimizer = build(config, mesh)
    batch = _batch(seed)
    before = _activations(model.module, batch)
    for _ in range(steps):
        loss = forward_backward(model, mesh, [batch])
        sums = reduce_step(model, optimizer, mesh, loss, batch.num_tokens)
        scale_and_clip(optimizer, sums, config.optimizer.clip_grad_norm)
        optimizer.step(config.optimizer.lr)
    changes = {}
    for name, after in _activations(model.module, batch).items():
        changes[name] = float((after - before[name]).square().mean().sqrt())
    return changes


def _batch(seed: int) -> Batch:
    """Returns random tokens, of which half follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_SAMPLES, _LENGTH + 1)
    steps = torch.randint(0, _VOCABULARY, shape, generator=generator)
    is_next = torch.rand(shape, generator=generator) < 0.5
    tokens = torch.where(is_next, 1, steps).cumsum(1) % _VOCABULARY
    return Batch(
        tokens_BS=tokens[:, :-1],
        labels_BS=tokens[:, 1:],
        loss_mask_BS=torch.ones(_SAMPLES, _LENGTH),
        position_ids=torch.arange(_LENGTH)[None],
        num_tokens=_SAMPLES * _LENGTH,
        first_sample=0,
    )


def _activations(model: GPT, batch: Batch) -> dict[str, Tensor]:
    """Returns the outputs of embedding, blocks, last norm and head."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module | None) -> Any:
        assert module is not None
        return module.register_forward_hook(
            lambda _module, _inputs, output: outputs.update({name: output.clone()})
        )

    hooks = [keep("embedding", model.embedding)]
    for index, block in model.layers.items():
        hooks.append(keep(f"layers.{index}", block))
    hooks.append(keep("final_norm", model.final_norm))
    with torch.no_grad():
        outputs["logits"] = model.logits(batch.tokens_BS, batch.position_ids)
    for hook in hooks:
        hook.remove()
    return outputs


def _coordinates(changes: Mapping[int, Mapping[str, float]]) -> tuple[Coordinate, ...]:
    """Returns the coordinates from the changes by width and name, the narrowest first."""
    widths = list(changes)
    coordinates = []
    for name in changes[widths[0]]:
        values = tuple(changes[width][name] for width in widths)
        if min(values) == 0:
            raise ValueError(f"{name} does not change; check more steps, or raise the rate")
        coordinates.append(Coordinate(name, values, _growth(widths, values)))
    return tuple(coordinates)


def _growth(widths: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of the logarithms, by least squares."""
    xs = [log2(width) for width in widths]
    ys = [log2(value) for value in values]
    slope, _ = linear_regression(xs, ys)
    return slope


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check the coordinates of a model's muP.")
    parser.add_argument("--fields", default="{}", help="model and optimizer as JSON")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--json", action="store_true", help="ignored: JSON is all it prints"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the check as JSON and returns its exit code.

    A user's error becomes one line on stderr.
    """
    options = _parse(arguments)
    fields = {**_DEFAULTS, **json.loads(options.fields)}
    try:
        check = check_coordinates(fields, options.widths, options.steps, options.seeds)
    except ValueError as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"error: {message}\n")
        return 1
    sys.stdout.write(json.dumps(asdict(check)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
