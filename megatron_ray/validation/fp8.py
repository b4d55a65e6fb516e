"""Checks matrix products in FP8: what they exclude, and the sizes that they need.

Kernels multiply multiples of 16 elements, those of mxfp8 multiples of 32. Where tp or etp
splits a size, blocks that share a scale must not lie on two ranks, so that a layout does
not change the numbers. Pure. Must not know: devices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import Fp8Config

_POINTER = "/training/fp8"
_BLOCKS = {"blockwise": 128, "mxfp8": 32}
"""Elements in a row of a block."""


def fp8_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `training.fp8`."""
    fp8 = config.training.fp8
    if fp8 is None:
        return []
    precision = config.training.precision
    problems = []
    if precision != "bf16":
        detail = (
            f"fp8 is for precision=bf16, not for {precision}: what is not multiplied in FP8 "
            "is bf16; set precision to bf16, or leave fp8 out"
        )
        problems.append(Problem(_POINTER, "fp8_precision", detail))
    problems += _field_problems(fp8)
    problems += _gather_problems(fp8, config.parallel.zero)
    problems += _layer_problems(fp8, config.model)
    for size in _sizes(config, fp8):
        problems += size.problems(fp8)
    return problems


def _field_problems(fp8: Fp8Config) -> list[Problem]:
    """Returns fields of other recipes than the given one."""
    problems = []
    defaults = Fp8Config(recipe=fp8.recipe)
    for name in ("margin", "amax_history_length", "amax_algorithm"):
        value = getattr(fp8, name)
        if fp8.recipe != "delayed" and value != getattr(defaults, name):
            detail = (
                f"{name}={value} is for recipe=delayed, not for {fp8.recipe}, whose scales "
                "come from the tensors themselves; leave it out"
            )
            problems.append(Problem(f"{_POINTER}/{name}", "fp8_recipe", detail))
    if fp8.recipe in _BLOCKS and fp8.format == "hybrid":
        detail = (
            f"format=hybrid is for delayed and current: the kernels of {fp8.recipe} multiply "
            "e4m3 only; leave it out"
        )
        problems.append(Problem(f"{_POINTER}/format", "fp8_recipe", detail))
    return problems


def _gather_problems(fp8: Fp8Config, zero: int) -> list[Problem]:
    """Returns why weights cannot be gathered in FP8."""
    if not fp8.param_gather:
        return []
    pointer = f"{_POINTER}/param_gather"
    problems = []
    if zero != 3:
        detail = (
            f"param_gather needs zero=3, not {zero}, which gathers no weights before their "
            "products; leave it out, or use zero=3"
        )
        problems.append(Problem(pointer, "fp8_gather", detail))
    if fp8.recipe != "current":
        reasons = {
            "delayed": "looks for the largest value of whole weights in each product",
            "blockwise": "has a scale for 128 x 128 elements, which ranks share",
            "mxfp8": "quantizes a weight and its transpose differently",
        }
        detail = (
            f"param_gather is for recipe=current: {fp8.recipe} {reasons[fp8.recipe]}; use "
            "current, or leave param_gather out"
        )
        problems.append(Problem(pointer, "fp8_gather", detail))
    return problems


def _layer_problems(fp8: Fp8Config, model: ModelConfig) -> list[Problem]:
    first = fp8.first_layers_in_bf16
    last = fp8.last_layers_in_bf16
    if first + last < model.num_layers:
        return []
    detail = (
        f"first_layers_in_bf16 + last_layers_in_bf16 = {first} + {last} leave none of the "
        f"{model.num_layers} layers to multiply in FP8; lower one of them, or leave fp8 out"
    )
    return [Problem(_POINTER, "fp8_layers", detail)]


@dataclass(frozen=True)
class _Size:
    """A size of products on one rank: value x unit / degree."""

    field: str
    """Path of the field with the value."""
    value: int
    multiple: int
    """What the size must be a multiple of."""
    degree: int = 1
    """Number of ranks that share it."""
    unit: int = 1
    axes: str = ""
    """Names of the axes of these ranks."""

    def problems(self, fp8: Fp8Config) -> list[Problem]:
        """Returns a problem with the nearest legal value unless the size is legal."""
        whole = self.value * self.unit
        # Sizes that ranks cannot share at all have rules of their own.
        if whole % self.degree or whole // self.degree % self.multiple == 0:
            return []
        total = self.degree * self.multiple
        step = total // gcd(total, self.unit)
        nearest = max(1, round(self.value / step)) * step
        name = self.field.rpartition("/")[2]
        given = f"{name}={self.value}"
        if self.unit > 1:
            given += f" x {self.unit}"
        if self.degree > 1:
            given += f" over {self.axes}={self.degree}"
        detail = (
            f"{given} gives products of {whole // self.degree} elements on a rank, and "
            f"fp8.recipe={fp8.recipe} needs a multiple of {self.multiple}; the nearest "
            f"{name} is {nearest}"
        )
        return [Problem(f"/{self.field}", "fp8_size", detail)]


def _sizes(config: TrainConfig, fp8: Fp8Config) -> Iterator[_Size]:
    """Yields all sizes of the products."""
    model = config.model
    parallel = config.parallel
    aligned = 32 if fp8.recipe == "mxfp8" else 16
    training = config.training
    degree = parallel.cp
    axes = "cp"
    # Projections to latents multiply a rank's own tokens only.
    if parallel.sequence_parallel and model.mla is not None:
        degree *= parallel.tp
        axes = "cp x tp"
    yield _Size(
        "training/seq_length",
        training.seq_length,
        aligned,
        degree,
        training.micro_batch_size,
        axes,
    )
    yield _Size("model/hidden_size", model.hidden_size, aligned)
    of_tp = _split_multiple(fp8, parallel.tp, aligned)
    if model.moe is None or model.has_plain_mlp:
        yield _Size("model/ffn_hidden_size", model.ffn_width, of_tp, parallel.tp, axes="tp")
    if model.moe is not None:
        etp = parallel.expert_tp
        of_etp = _split_multiple(fp8, etp, aligned)
        name = "model/moe/ffn_hidden_size"
        yield _Size(name, model.expert_width, of_etp, etp, axes="etp")
        shared = model.moe.shared_expert_ffn_hidden_size
        if shared is not None:
            name = "model/moe/shared_expert_ffn_hidden_size"
            yield _Size(name, shared, of_tp, parallel.tp, axes="tp")
    yield from _attention_sizes(model, parallel.tp, of_tp, aligned)


def _split_multiple(fp8: Fp8Config, degree: int, aligned: int) -> int:
    """Returns what a size must be a multiple of on each of `degree` ranks."""
    if degree == 1:
        return aligned
    return _BLOCKS.get(fp8.recipe, aligned)


def _attention_sizes(
    model: ModelConfig, tp: int, split: int, aligned: int
) -> Iterator[_Size]:
    heads = model.num_attention_heads
    mla = model.mla
    if mla is None:
        yield _Size("model/head_dim", model.head_width, split, tp, heads, "tp")
        # With fewer key/value heads than ranks each rank has one.
        groups = max(model.kv_heads, tp)
        if groups != heads:
            yield _Size("model/head_dim", model.head_width, split, tp, groups, "tp")
        return
    prefix = "model/mla/"
    if mla.q_lora_rank is not None:
        yield _Size(f"{prefix}q_lora_rank", mla.q_lora_rank, aligned)
    yield _Size(f"{prefix}kv_lora_rank", mla.kv_lora_rank, aligned)
    yield _Size(f"{prefix}qk_rope_head_dim", mla.qk_rope_head_dim, aligned)
    for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
        yield _Size(f"{prefix}{name}", getattr(mla, name), split, tp, heads, "tp")
