"""Stands in for Transformer Engine where there is no GPU: its modules with the recorded
signatures, in plain torch.

Calls bind to what `tests/golden/transformer_engine.json` has from the library's own source,
so an argument that the library does not know is an error here, too. Gradients of weights
are added to `main_grad` in the backward pass, as the library does, and the flag that
overwrites it is read in the forward pass.
"""

import ast
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from inspect import Parameter, Signature
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.parallelize import parallelize
from megatron_ray.parallelize.transformer_engine.library import TransformerEngine

RECORDED = json.loads(
    (Path(__file__).parents[1] / "golden" / "transformer_engine.json").read_text()
)


KINDS = {
    "keyword": Parameter.KEYWORD_ONLY,
    "*": Parameter.VAR_POSITIONAL,
    "**": Parameter.VAR_KEYWORD,
}


def signature(rows: list[str]) -> Signature:
    """The signature of recorded parameters."""
    parameters = []
    for row in rows:
        prefix = row[: -len(row.lstrip("*"))] or row.partition(" ")[0]
        kind = KINDS.get(prefix, Parameter.POSITIONAL_OR_KEYWORD)
        name, _, default = row.removeprefix("keyword ").lstrip("*").partition("=")
        value = ast.literal_eval(default) if default else Parameter.empty
        parameters.append(Parameter(name, kind, default=value))
    return Signature(parameters)


def bound(name: str, method: str, args: Any, kwargs: Any) -> SimpleNamespace:
    """The arguments of a call, by name, with the library's defaults."""
    arguments = signature(RECORDED["pytorch"][name][method]).bind(*args, **kwargs)
    arguments.apply_defaults()
    return SimpleNamespace(**arguments.arguments)


@dataclass
class Watched:
    """What was called, for tests."""

    recipes: list[tuple[str, Any]] = field(default_factory=list)
    """(class, recipe or None) of every pass of a product."""
    modules: list[nn.Module] = field(default_factory=list)
    attended: list[dict[str, Any]] = field(default_factory=list)
    recipe: Any = None
    """The recipe of the passes that run."""


class Recorded(nn.Module):
    watched: Watched

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.given = bound(type(self).__name__, "__init__", args, kwargs)

    def arguments(self, args: Any, kwargs: Any) -> SimpleNamespace:
        return bound(type(self).__name__, "forward", args, kwargs)

    def empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(
            torch.empty(shape, dtype=self.given.params_dtype, device=self.given.device)
        )


class Product(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight = weight
        ctx.overwrites = getattr(weight, "overwrite_main_grad", False)
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inputs,) = ctx.saved_tensors
        weight = ctx.weight
        if weight.requires_grad:
            product = grad.t() @ inputs
            if ctx.overwrites:
                weight.main_grad.copy_(product)
            else:
                weight.main_grad.add_(product)
        return grad @ weight, None


class Gather(AutogradFunction[Tensor]):
    """All tokens of the group; the gradient is summed and cut again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gathered(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_rows(summed(grad, ctx.group), ctx.group), None


class Scatter(AutogradFunction[Tensor]):
    """This rank's tokens of the sum over the group."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return own_rows(summed(rows, group), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad.contiguous(), ctx.group), None


class Copy(AutogradFunction[Tensor]):
    """The same on every rank; the gradient is summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class Sum(AutogradFunction[Tensor]):
    """The sum over the group; the gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        return summed(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gathered(rows: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows, group=group)
    return torch.cat(parts)


def summed(rows: Tensor, group: Any) -> Tensor:
    total = rows.clone().contiguous()
    dist.all_reduce(total, group=group)
    return total


def own_rows(rows: Tensor, group: Any) -> Tensor:
    return rows.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


class Linear(Recorded):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.given
        size = 1 if given.tp_group is None else dist.get_world_size(given.tp_group)
        assert size == given.tp_size
        outputs, inputs = given.out_features, given.in_features
        if given.parallel_mode == "column":
            outputs //= size
        elif given.parallel_mode == "row":
            inputs //= size
        self.weight = self.empty(outputs, inputs)
        if given.bias:
            self.bias: Tensor = self.empty(outputs)
        self.watched.modules.append(self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.multiply(self.arguments(args, kwargs).inp)

    def multiply(self, inputs: Tensor) -> Tensor:
        given = self.given
        assert given.fuse_wgrad_accumulation
        assert inputs.dtype == given.params_dtype
        self.watched.recipes.append((type(self).__name__, self.watched.recipe))
        group = given.tp_group
        is_split = given.sequence_parallel and group is not None
        if group is not None and given.parallel_mode == "column":
            inputs = (Gather if is_split else Copy).apply(inputs, group)
        output = Product.apply(inputs, self.weight)
        if group is not None and given.parallel_mode == "row":
            output = (Scatter if is_split else Sum).apply(output, group)
        if given.bias:
            # Computed in the product of the weight's gradient, so not without that.
            bias = self.bias if self.weight.requires_grad else self.bias.detach()
            output = output + bias
        return output


class LayerNormLinear(Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inputs = self.given.in_features
        self.layer_norm_weight: Tensor = self.empty(inputs)
        if self.given.normalization == "LayerNorm":
            self.layer_norm_bias: Tensor = self.empty(inputs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = self.arguments(args, kwargs).inp
        given = self.given
        weight = self.layer_norm_weight
        if given.zero_centered_gamma:
            weight = weight + 1
        if given.normalization == "LayerNorm":
            normed = nn.functional.layer_norm(
                inputs, weight.shape, weight, self.layer_norm_bias, given.eps
            )
        else:
            normed = nn.functional.rms_norm(inputs, weight.shape, weight, given.eps)
        return self.multiply(normed)


class GroupedLinear(Recorded):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.given
        assert not given.bias
        for index in range(given.num_gemms):
            weight = self.empty(given.out_features, given.in_features)
            self.register_parameter(f"weight{index}", weight)
        self.watched.modules.append(self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = self.arguments(args, kwargs)
        self.watched.recipes.append((type(self).__name__, self.watched.recipe))
        parts = arguments.inp.split(arguments.m_splits)
        return torch.cat(
            [
                Product.apply(rows, getattr(self, f"weight{index}"))
                for index, rows in enumerate(parts)
            ]
        )


class Fp8Padding(Recorded):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[int]]:
        arguments = self.arguments(args, kwargs)
        align = self.given.align_size
        splits = [-(-split // align) * align for split in arguments.m_splits]
        rows = [
            nn.functional.pad(part, (0, 0, 0, split - len(part)))
            for part, split in zip(
                arguments.inp.split(arguments.m_splits), splits, strict=True
            )
        ]
        return torch.cat(rows), splits


class Fp8Unpadding(Recorded):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = self.arguments(args, kwargs)
        align = self.given.align_size
        splits = [-(-split // align) * align for split in arguments.m_splits]
        rows = zip(arguments.inp.split(splits), arguments.m_splits, strict=True)
        return torch.cat([part[:split] for part, split in rows])


class DotProductAttention(Recorded):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = self.arguments(args, kwargs)
        self.watched.attended.append(vars(arguments))
        q, k, v = arguments.query_layer, arguments.key_layer, arguments.value_layer
        given = self.given
        assert q.shape[-2:] == (given.num_attention_heads, given.kv_channels)
        assert k.shape[-2] == given.num_gqa_groups
        if arguments.qkv_format == "thd":
            assert arguments.attn_mask_type == "padding_causal"
            ends = arguments.cu_seqlens_q.tolist()
            assert arguments.max_seqlen_q == max(torch.tensor(ends).diff())
            parts = [
                attend(q[None, a:b], k[None, a:b], v[None, a:b], arguments.window_size)[0]
                for a, b in pairwise(ends)
            ]
            return torch.cat(parts).flatten(-2)
        assert arguments.qkv_format == "bshd"
        assert given.attn_mask_type == "causal"
        return attend(q, k, v, arguments.window_size).flatten(-2)


def stand_in() -> tuple[TransformerEngine, Watched]:
    """The library's modules as our code uses them, and what is called of them."""
    watched = Watched()

    @contextmanager
    def autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
        arguments = bound("autocast", "__init__", args, kwargs)
        assert arguments.enabled
        watched.recipe = arguments.recipe
        yield
        watched.recipe = None

    modules = {
        each.__name__: type(each.__name__, (each,), {"watched": watched})
        for each in (
            Linear,
            LayerNormLinear,
            GroupedLinear,
            Fp8Padding,
            Fp8Unpadding,
            DotProductAttention,
        )
    }
    pytorch = SimpleNamespace(autocast=autocast, **modules)
    return TransformerEngine(pytorch, recipes()), watched


def attend(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int]) -> Tensor:
    """Causal attention within a window: [B, S, N, D]."""
    length = q.shape[1]
    before, after = window
    assert after == 0
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = distance >= 0
    if before >= 0:
        mask &= distance <= before
    attended = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return attended.transpose(1, 2)


def recipes() -> Any:
    """The library's recipes with their recorded fields."""
    recorded = RECORDED["common.recipe"]
    names = recorded["Format"]["fields"]
    made: dict[str, Any] = {"Format": Enum("Format", names)}
    for name in recorded:
        if name != "Format":
            made[name] = recipe_class(name, recorded[name]["fields"])
    return SimpleNamespace(**made)


def recipe_class(name: str, fields: list[str]) -> Callable[..., SimpleNamespace]:
    def make(**given: Any) -> SimpleNamespace:
        assert set(given) <= set(fields)
        return SimpleNamespace(kind=name, **given)

    return make


@contextmanager
def installed() -> Iterator[Watched]:
    """The stand-in in the place of the library, for `parallelize`."""
    engine, watched = stand_in()
    with patch.object(parallelize, "load_transformer_engine", lambda *_: engine):
        yield watched
