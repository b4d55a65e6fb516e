"""Attention by stripes is attention with a mask, in every type and on either way, and a
window as long as the sequence is none.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.rng import Streams
from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.batch import Packed
from megatron_ray.models.dropout import AttentionWithDropout
from megatron_ray.ops.attention.sliding_window import (
    masked_attention,
    stripes,
    windowed_attention,
)
from tests.support.packed_rows import packed_rows

CPU = DeviceKind("cpu", bf16_products=True)
ALLOWED = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3}
CASES = [(48, 5), (48, 47), (300, 7), (300, 1), (300, 200), (700, 128)]


def inputs(sequence: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, sequence, heads, 16, generator=draw)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (4, 2, 2)
    ]


def masked(sequence: int, window: int) -> Callable[..., Tensor]:
    """By the definition: a token sees those that are less than a window behind it."""
    behind = torch.arange(sequence)[:, None] - torch.arange(sequence)
    seen = (behind >= 0) & (behind < window)
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )


def run(
    attend: Callable[..., Tensor], qkv: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    output = attend(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    (output.double() * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


WAYS: dict[str, Callable[..., Tensor]] = {
    "fused": partial(windowed_attention, in_fp32=False),
    "fused-in-fp32": partial(windowed_attention, in_fp32=True),
    "by-torch": masked_attention,
}
WAYS_AND_TYPES = [
    (way, dtype)
    for way, dtype in product(WAYS, ALLOWED)
    if way != "fused-in-fp32" or dtype == torch.bfloat16
]


@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_TYPES)
@pytest.mark.parametrize(("sequence", "window"), CASES)
def test_stripes_are_a_mask(
    sequence: int, window: int, dtype: torch.dtype, way: str
) -> None:
    qkv = inputs(sequence, dtype)
    truth = run(masked(sequence, window), qkv, torch.float64)
    measured = run(lambda *parts: WAYS[way](*parts, window), qkv, dtype)
    assert measured[0].dtype == dtype
    if way != "by-torch":
        assert measured[0].transpose(1, 2).is_contiguous(), "merging the heads would copy"
    # Scores of a token that sees itself only have no gradient but rounding, of the size
    # of what cancels.
    floor = float(truth[3].norm()) if window == 1 else 0.0
    for one, exact in zip(measured, truth, strict=True):
        assert float((one.double() - exact).norm()) <= ALLOWED[dtype] * max(
            float(exact.norm()), floor
        )


@pytest.mark.parametrize(("sequence", "window"), [*CASES, (4096, 1024), (1000, 601)])
def test_stripes_cover_every_row_with_what_it_sees_and_little_more(
    sequence: int, window: int
) -> None:
    scores = 0
    for stripe in stripes(sequence, window):
        rows, columns, first = stripe.shape
        assert 0 <= max(0, stripe.rows.start - window + 1) - stripe.columns.start < 16
        assert stripe.columns.stop == stripe.rows.stop
        assert first == stripe.rows.start - stripe.columns.start
        scores += rows * columns
    assert scores <= sequence * (window + 16 + max(128, window // 4))


def test_a_window_as_long_as_the_sequence_hides_nothing() -> None:
    qkv = inputs(32, torch.float32)
    assert torch.equal(LocalAttention(CPU, 32)(*qkv, None), LocalAttention(CPU)(*qkv, None))


@pytest.mark.parametrize(
    "packed",
    [None, packed_rows((10, 14), (24,))],
)
def test_documents_and_dropout_know_the_window(packed: Packed | None) -> None:
    q, k, v = (x.double() for x in inputs(24, torch.float32))
    behind = torch.arange(24)[:, None] - torch.arange(24)
    seen = ((behind >= 0) & (behind < 6)).expand(2, 1, 24, 24)
    if packed is not None:
        seen = seen & (
            packed.documents_BS[:, None, :, None] == packed.documents_BS[:, None, None, :]
        )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )
    torch.testing.assert_close(
        LocalAttention(CPU, 6)(q, k, v, packed), expected, rtol=1e-12, atol=1e-12
    )
    dropping = AttentionWithDropout(
        0.0, Streams(7, {"tp": 0, "cp": 0}).stream("layers.0", ("cp", "tp")), 6
    )
    torch.testing.assert_close(
        dropping(q, k, v, packed, 0), expected, rtol=1e-12, atol=1e-12
    )
