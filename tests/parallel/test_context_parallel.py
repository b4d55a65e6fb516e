"""Context parallelism: what each method sends, what it holds, and that documents kept
apart stay apart under every cut.
"""

import gc
import weakref
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.context_parallel import ring
from megatron_ray.context_parallel.tiles import Documents, PartialAttention, Tile, attend
from megatron_ray.models.attention import LocalAttention
from megatron_ray.parallelize.parallelize import context_attention
from megatron_ray.sharding.sequence_split import SequenceCut
from tests.support.packed_rows import packed_rows
from tests.support.parity import LLAMA, make_config, make_mesh
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
HIERARCHY = {"cp": 4, "cp_method": "a2a+p2p", "hierarchical_cp_sizes": (2, 2)}


def grad_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def attend_and_count(
    rank: int, world_size: int, parallel: dict[str, Any], dtype: torch.dtype
) -> tuple[Counter[str], int, float]:
    """Calls of torch.distributed by name in one forward and backward, most foreign
    blocks at once, worst distance from one rank.
    """
    mesh = make_mesh(rank, world_size, make_config(LLAMA, {"dp": 1} | parallel, steps=1))
    torch.manual_seed(1)
    batch = 2
    heads = 8
    groups = 4
    length = 64
    width = 16
    q, k, v, grad = (
        torch.randn(batch, count, length, width, dtype=dtype)
        for count in (heads, groups, groups, heads)
    )
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(
        whole[0], whole[1], whole[2], is_causal=True, enable_gqa=True
    )
    expected.backward(grad)
    here = torch.from_numpy(SequenceCut(world_size, rank).positions(length))
    mine = [x[:, :, here].clone().requires_grad_() for x in (q, k, v)]
    blocks: list[weakref.ref[Tensor]] = []
    with counting(blocks) as (calls, most):
        output = context_attention(parallel.get("cp_method", "p2p"), mesh)(*mine, None)
        output.backward(grad[:, :, here])
    pairs = [
        (output, expected[:, :, here]),
        *(
            (grad_of(part), grad_of(full)[:, :, here])
            for part, full in zip(mine, whole, strict=True)
        ),
    ]
    return calls, most[0], max(float((a - b).norm() / b.norm()) for a, b in pairs)


class counting:  # noqa: N801 - reads as a statement
    """Counts calls of torch.distributed, and blocks of keys and values from other ranks
    that are alive together.
    """

    def __init__(self, blocks: list[weakref.ref[Tensor]]) -> None:
        self.blocks = blocks
        self.calls = Counter[str]()
        self.most = [0]
        self.hops: Any = ring._Hops
        self.names = (
            "batch_isend_irecv",
            "all_to_all_single",
            "all_gather_into_tensor",
            "all_gather_single",
            "all_reduce",
            "isend",
        )

    def __enter__(self) -> tuple[Counter[str], list[int]]:
        self.originals = {
            name: getattr(dist, name) for name in self.names if hasattr(dist, name)
        }
        for name, original in self.originals.items():
            setattr(dist, name, self.counted(name, original))
        self.start = start = self.hops.start

        def watched(hops: Any, tensor: Tensor) -> Any:
            arriving = start(hops, tensor)
            self.blocks.append(weakref.ref(arriving.tensor))
            self.most[0] = max(
                self.most[0], sum(block() is not None for block in self.blocks)
            )
            return arriving

        self.hops.start = watched
        gc.collect()
        return self.calls, self.most

    def counted(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            # On CPU collectives are made of tagged messages.
            self.calls["in a collective" if kwargs.get("tag") else name] += 1
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)
        self.hops.start = self.start


def test_the_ring_holds_two_foreign_blocks_and_sends_only_point_to_point() -> None:
    for calls, most, distance in run_ranks(attend_and_count, 4, {"cp": 4}, torch.float32):
        # Forward: keys and values three hops. Backward: the same, and their gradients
        # four, to come home.
        assert calls == {"isend": 3 + 3 + 4}
        assert most <= 2 + 2, "two blocks, and in the backward two gradients"
        assert distance < 1e-6


@pytest.mark.parametrize(
    "parallel",
    [{"cp": 2, "cp_method": "all_gather"}, {"cp": 4, "cp_method": "a2a"}, HIERARCHY],
)
def test_every_method_is_attention_over_the_whole_sequence(
    parallel: dict[str, Any],
) -> None:
    for calls, _, distance in run_ranks(
        attend_and_count, parallel["cp"], parallel, torch.float64
    ):
        assert distance < 1e-12
        assert ("all_to_all_single" in calls) == ("a2a" in parallel["cp_method"])
        assert ("isend" in calls) == ("p2p" in parallel["cp_method"])


METHODS: tuple[dict[str, Any], ...] = (
    {"cp": 4},
    {"cp": 4, "cp_method": "all_gather"},
    {"cp": 4, "cp_method": "a2a"},
    HIERARCHY,
)


def windowed(
    rank: int, world_size: int, windows: list[int]
) -> dict[tuple[str, int, bool], float]:
    """Worst distance from one rank of outputs and gradients, by method, window and
    whether documents are apart.
    """
    torch.manual_seed(1)
    batch = 2
    heads = 8
    groups = 4
    length = 64
    width = 16
    q, k, v, grad = (
        torch.randn(batch, count, length, width, dtype=torch.float64)
        for count in (heads, groups, groups, heads)
    )
    documents = torch.arange(length).ge(23).int().expand(batch, -1)
    behind = torch.arange(length)[:, None] - torch.arange(length)
    here = torch.from_numpy(SequenceCut(world_size, rank).positions(length))
    worst: dict[tuple[str, int, bool], float] = {}
    for parallel in METHODS:
        mesh = make_mesh(
            rank, world_size, make_config(LLAMA, {"dp": 1} | parallel, steps=1)
        )
        for window, packed in product(windows, (None, packed_rows(*[(23, 41)] * batch))):
            seen = (behind >= 0) & (behind < window)
            if packed is not None:
                seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
            whole = [x.clone().requires_grad_() for x in (q, k, v)]
            expected = nn.functional.scaled_dot_product_attention(
                whole[0], whole[1], whole[2], attn_mask=seen, enable_gqa=True
            )
            expected.backward(grad)
            mine = [x[:, :, here].clone().requires_grad_() for x in (q, k, v)]
            method = str(parallel.get("cp_method", "p2p"))
            output = context_attention(method, mesh, window)(*mine, packed)
            output.backward(grad[:, :, here])
            pairs = [
                (output, expected[:, :, here]),
                *(
                    (grad_of(part), grad_of(full)[:, :, here])
                    for part, full in zip(mine, whole, strict=True)
                ),
            ]
            worst[method, window, packed is not None] = max(
                float((a - b).norm() / v.norm()) for a, b in pairs
            )
    return worst


def test_every_method_knows_the_window() -> None:
    # Shorter than a chunk of 8 tokens, of one, ending within one, over several, and
    # longer than the sequence.
    for worst in run_ranks(windowed, 4, [1, 3, 8, 9, 21, 60, 64, 100]):
        assert len(worst) == 4 * 8 * 2
        assert max(worst.values()) < 1e-12, worst


@pytest.mark.parametrize(
    ("dtype", "wide", "off"),
    [
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 2e-2),
        (torch.bfloat16, True, 1e-5),
    ],
)
def test_queries_that_see_nothing_of_a_tile_are_not_touched_by_it(
    dtype: torch.dtype, wide: bool, off: float
) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, 6, 8, generator=generator).to(dtype) for _ in range(3))
    documents = Documents(
        torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    )
    partial = PartialAttention.empty(q, in_fp32=wide)
    for keys in (slice(0, 3), slice(3, 6)):
        attend(partial, q, k, v, [Tile(slice(0, 6), keys)], documents)
    outputs = []
    for part in (slice(3), slice(3, 6)):
        q_part, k_part, v_part = (x[:, :, part].float() for x in (q, k, v))
        outputs.append(nn.functional.scaled_dot_product_attention(q_part, k_part, v_part))
    apart = torch.cat(outputs, 2)
    torch.testing.assert_close(partial.output, apart, rtol=off, atol=off)


def test_one_rank_attends_to_whole_sequences() -> None:
    mesh = make_mesh(0, 1, make_config(LLAMA, {"dp": 1}, steps=1))
    assert isinstance(context_attention("p2p", mesh), LocalAttention)
