"""Attention within documents by one call: its arguments, and on a GPU its numbers."""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.distributed import device
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.batch import Packed
from tests.support.packed_rows import packed_rows

HOPPER = DeviceKind("cuda", bf16_products=True, capability=(9, 0))
LENGTHS = ((10, 14), (3, 1, 20))
WINDOWS = [None, 6, 24]


def inputs(groups: int = 2, where: str = "cpu") -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, heads, 24, 16, generator=draw)
        .to(where, torch.bfloat16)
        .requires_grad_()
        for heads in (4, groups, groups)
    ]


def masked(qkv: list[Tensor], packed: Packed, window: int | None) -> Tensor:
    """The same in fp64, with all scores between documents masked."""
    q, k, v = (x.double() for x in qkv)
    index = torch.arange(24, device=q.device)
    behind = index[:, None] - index
    documents = packed.documents_BS
    seen = documents[:, None, :, None] == documents[:, None, None, :]
    seen = seen & (behind >= 0) & (behind < (window or 24))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )
    return attended.to(qkv[0].dtype)


def gradients(attended: Tensor, qkv: list[Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    upstream = torch.randn(attended.shape, generator=draw).to(attended)
    return list(torch.autograd.grad(attended, qkv, upstream))


class StandIn:
    """The kernel's function, document by document in fp64."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def varlen_attn(
        self,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        self.calls.append(
            {
                "shapes": [tuple(x.shape) for x in (q_TND, k_TGD, v_TGD)],
                "cu_seqlens": (cu_seq_q.dtype, cu_seq_q.tolist(), cu_seq_k.tolist()),
                "longest": (max_q, max_k),
                "window_size": window_size,
                "enable_gqa": enable_gqa,
            }
        )
        before, after = window_size
        assert after == 0
        attended = []
        for start, end in pairwise(cu_seq_q.tolist()):
            q, k, v = (x[start:end].transpose(0, 1).double() for x in (q_TND, k_TGD, v_TGD))
            index = torch.arange(end - start)
            behind = index[:, None] - index
            seen = behind >= 0
            if before >= 0:
                seen &= behind <= before
            by_head = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, enable_gqa=enable_gqa
            )
            attended.append(by_head.transpose(0, 1))
        return torch.cat(attended).to(q_TND.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    module = SimpleNamespace(varlen_attn=stand_in.varlen_attn)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    return stand_in


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [2, 4])
def test_one_call_has_all_documents(
    kernel: StandIn, groups: int, window: int | None
) -> None:
    packed = packed_rows(*LENGTHS)
    qkv = inputs(groups)
    attended = LocalAttention(HOPPER, window)(*qkv, packed)
    assert kernel.calls == [
        {
            "shapes": [(48, 4, 16), (48, groups, 16), (48, groups, 16)],
            "cu_seqlens": (torch.int32, [0, 10, 24, 27, 28, 48], [0, 10, 24, 27, 28, 48]),
            "longest": (20, 20),
            "window_size": (-1, 0) if window is None else (window - 1, 0),
            "enable_gqa": groups == 2,
        }
    ]
    expected = masked(qkv, packed, window)
    torch.testing.assert_close(attended, expected)
    assert attended.transpose(1, 2).is_contiguous(), "as the output projection reads it"
    for one, other in zip(gradients(attended, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(one, other)


def test_other_rows_and_devices_do_not_call_it(kernel: StandIn) -> None:
    qkv = inputs()
    packed = packed_rows(*LENGTHS)
    LocalAttention(HOPPER)(*qkv, None)
    LocalAttention(DeviceKind("cuda", bf16_products=True))(*qkv, packed)
    LocalAttention(HOPPER)(*(x.float() for x in qkv), packed)
    assert kernel.calls == []


def test_torch_accepts_the_arguments() -> None:
    """Its own checks and shapes, on tensors without numbers."""
    qkv = [torch.empty_like(x, device="meta").requires_grad_() for x in inputs()]
    attended = LocalAttention(HOPPER, 6)(*qkv, packed_rows(*LENGTHS, device="meta"))
    assert attended.shape == qkv[0].shape
    upstream = torch.empty_like(attended)
    shapes = [grad.shape for grad in torch.autograd.grad(attended, qkv, upstream)]
    assert shapes == [x.shape for x in qkv]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [2, 4])
def test_the_kernel_attends_within_documents(groups: int, window: int | None) -> None:
    packed = packed_rows(*LENGTHS, device="cuda")
    qkv = inputs(groups, "cuda")
    attended = LocalAttention(device.kind_of("cuda"), window)(*qkv, packed)
    expected = masked(qkv, packed, window)
    torch.testing.assert_close(attended, expected, rtol=1.6e-2, atol=1e-2)
    for one, other in zip(gradients(attended, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(one, other, rtol=1.6e-2, atol=2e-2)
