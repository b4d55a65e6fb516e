"""Attention by blocks, and in fp32, against float64, and against torch's fused
attention in the same bf16.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ray.ops.attention.blockwise import (
    _LARGEST,
    _SCORES,
    _tiles,
    causal_attention,
)
from megatron_ray.ops.attention.fp32 import fp32_causal_attention

SHAPES = {  # batch, heads, key/value heads, sequence, head width, factor on the queries
    "one-block": (2, 4, 4, 48, 16, 1.0),
    "several": (2, 4, 4, 256, 64, 1.0),
    "grouped": (2, 8, 2, 300, 128, 1.0),
    "one-key-head": (3, 4, 1, 77, 16, 1.0),
    "odd-width": (1, 6, 3, 500, 80, 1.0),
    "sharp": (2, 4, 4, 256, 64, 6.0),
}


def relative(measured: Tensor, truth: Tensor) -> float:
    return float(
        (measured.detach().double() - truth.detach()).norm() / truth.detach().norm()
    )


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1]
    )


@pytest.mark.parametrize("attention", [causal_attention, fp32_causal_attention])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_exact_as_fused_attention(
    shape: str, attention: Callable[..., Tensor]
) -> None:
    batch, heads, groups, sequence, width, factor = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> Tensor:
        return torch.randn(batch, sequence, count, width, generator=generator)

    parts = [
        (draw(heads) * factor).bfloat16(),
        draw(groups).bfloat16(),
        draw(groups).bfloat16(),
    ]
    grad = draw(heads).bfloat16().transpose(1, 2)

    def run(
        attend: Callable[..., Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        leaves = [
            part.to(dtype).transpose(1, 2).detach().requires_grad_() for part in parts
        ]
        output = attend(*leaves)
        output.backward(grad.to(dtype))
        return output, [leaf.grad for leaf in leaves if leaf.grad is not None]

    truth, true_grads = run(fused, torch.float64)
    fused_output, fused_grads = run(fused, torch.bfloat16)
    ours, our_grads = run(attention, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert ours.shape == fused_output.shape
    assert ours.transpose(1, 2).is_contiguous(), "merging the heads would copy"
    assert relative(ours, truth) <= 1.3 * relative(fused_output, truth)
    # The product behind the gradients of the probabilities is rounded once more here;
    # what that does to a model, the judges show.
    for own, peer, exact in zip(our_grads, fused_grads, true_grads, strict=True):
        assert relative(own, exact) <= 1.8 * relative(peer, exact)


def test_the_future_is_not_seen() -> None:
    q, k, v = (
        torch.randn(1, 2, 300, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for seed in (1, 2, 3)
    )
    before = causal_attention(q, k, v)
    for tensor in (k, v):
        tensor[:, :, 200:] = 1000.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


def test_is_repeatable_to_the_bit() -> None:
    def gradients() -> list[Tensor | None]:
        leaves = [
            torch.randn(2, 4, 200, 64, generator=torch.Generator().manual_seed(i))
            .bfloat16()
            .requires_grad_()
            for i in range(3)
        ]
        causal_attention(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for one, two in zip(gradients(), gradients(), strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("pairs", "per_pair", "sequence"),
    [(16, 1, 256), (8, 4, 2048), (3, 8, 100), (2, 1, 65536), (1, 32, 8192), (5, 1, 16)],
)
def test_tiles_cover_every_query_once_within_the_memory_allowed(
    pairs: int, per_pair: int, sequence: int
) -> None:
    seen = torch.zeros(pairs, sequence)
    for tile in _tiles(torch.empty(pairs, per_pair, sequence, 1)):
        seen[tile.pairs, tile.rows] += 1
        num_pairs = tile.pairs.stop - tile.pairs.start
        scores = num_pairs * per_pair * (tile.columns - tile.first) * tile.columns
        assert scores <= max(_SCORES, _LARGEST, 16 * per_pair * sequence)
    assert torch.equal(seen, torch.ones_like(seen))
