"""Tokens that are sent while others are multiplied: in which order, and with the numbers of
a plain gather and reduce-scatter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.matmul import forward_product, input_grad_product
from megatron_ray.tensor_parallel.overlap import MessageOverlap, TokenOverlap
from megatron_ray.tensor_parallel.symmetric_memory import (
    PipelinedCopies,
    SymmetricMemoryOverlap,
)
from tests.parallel.test_parity import MODELS, compare, reference
from tests.parallel.test_recompute import DEEPSEEK, EXPERTS, gradients, with_recompute
from tests.support.parity import LLAMA, make_config
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
SPLIT: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
TP2 = SPLIT | {"tp_comm_overlap": True}


class Rank1Of3:
    """Stands in for a process group."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 3


class Exchange:
    """Notes what is sent where, and delivers ones when it is waited for."""

    def __init__(
        self, log: list[str], outgoing: Tensor, to: int, incoming: Tensor, sender: int
    ) -> None:
        self.log = log
        self.incoming = incoming
        self.sender = sender
        log.append(f"send {outgoing[0, 0].item():.0f} to {to}")

    def wait(self) -> None:
        self.log.append(f"wait for {self.sender}")
        self.incoming.fill_(1)

    def is_completed(self) -> bool:
        return False


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is sent, waited for and multiplied, in this order."""
    events: list[str] = []

    def start(
        outgoing: Tensor, to: int, incoming: Tensor, sender: int, _: Group
    ) -> Exchange:
        return Exchange(events, outgoing, to, incoming, sender)

    monkeypatch.setattr(collectives, "start_exchange", start)
    return events


def multiply_by_ten(
    log: list[str], rows: Tensor, /, *, out: Tensor | None = None
) -> Tensor:
    log.append(f"multiply {rows[0, 0].item():.0f}")
    return torch.mul(rows, 10, out=out)


def test_own_tokens_are_multiplied_while_those_of_others_arrive(log: list[str]) -> None:
    overlap = MessageOverlap(cast(dist.ProcessGroup, Rank1Of3()))
    gathered, output = overlap.gather_and_multiply(
        partial(multiply_by_ten, log), torch.full((2, 4), 5.0), 4
    )
    assert log == [
        "send 5 to 2",
        "multiply 5",
        "wait for 0",
        "send 1 to 2",
        "multiply 1",
        "wait for 0",
        "multiply 1",
    ]
    assert gathered[:, 0].tolist() == [1, 1, 5, 5, 1, 1]
    assert torch.equal(output, 10 * gathered)


def test_products_are_sent_while_the_next_ones_are_computed(log: list[str]) -> None:
    rows = torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, 4)
    overlap = MessageOverlap(cast(dist.ProcessGroup, Rank1Of3()))
    total = overlap.multiply_and_reduce_scatter(partial(multiply_by_ten, log), rows, 4)
    assert log == [
        "multiply 2",
        "send 20 to 2",
        "multiply 0",
        "send 0 to 0",
        "multiply 1",
        "wait for 0",
        "wait for 2",
    ]
    assert torch.equal(total, torch.full((2, 4), 12.0))


class Copies:
    """Stands in for symmetric memory, of which only GPUs have any."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def gather(
        self,
        shard: Tensor,
        shard_consumer: Callable[[Tensor, int], None],
        ag_out: Tensor,
        group_name: GroupName,
    ) -> None:
        assert group_name == self.group.group_name
        ag_out.copy_(collectives.all_gather_rows(shard, self.group))
        for step in range(self.group.size()):
            source = (self.group.rank() + step) % self.group.size()
            shard_consumer(ag_out.chunk(self.group.size())[source], source)

    def scatter(
        self,
        chunk_producer: Callable[[int, Tensor], None],
        output: Tensor,
        group_name: GroupName,
    ) -> None:
        assert group_name == self.group.group_name
        produced = torch.full_like(output, torch.nan)
        for receiver, chunk in enumerate(produced.chunk(self.group.size())):
            chunk_producer(receiver, chunk)
        output.copy_(collectives.all_to_all_rows(produced, self.group))


def overlaps(group: dist.ProcessGroup) -> list[TokenOverlap]:
    copies = Copies(group)
    return [
        MessageOverlap(group),
        SymmetricMemoryOverlap(group, PipelinedCopies(copies.gather, copies.scatter)),
    ]


def both_forms(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """Overlapped and plain results. Products of whole numbers are exact."""
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(rank)
    tokens = torch.randint(-8, 8, (3, 16)).float()
    weight = torch.randint(-8, 8, (5, 16)).float()
    grads = torch.randint(-8, 8, (3 * world_size, 5)).float()
    # Sums in bf16 depend on their order.
    addends = torch.randn(3 * world_size, 7).bfloat16()
    forward = partial(forward_product, weight_OI=weight)
    input_grad = partial(input_grad_product, weight_OI=weight)
    plain = collectives.all_gather_rows(tokens, group)
    pairs = []
    for overlap in overlaps(group):
        gathered, output = overlap.gather_and_multiply(forward, tokens, 5)
        pairs += [(gathered, plain), (output, forward(plain))]
        for product, rows, width in ((input_grad, grads, 16), (copy_rows, addends, 7)):
            summed = collectives.reduce_scatter_rows(product(rows), group)
            total = overlap.multiply_and_reduce_scatter(product, rows, width)
            pairs.append((total, summed))
    return pairs


def copy_rows(rows: Tensor, /, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return out.copy_(rows)
    return rows.clone()


@pytest.mark.parametrize("ranks", [2, 4])
def test_numbers_are_those_of_the_plain_form(
    ranks: int, run_ranks: Callable[..., list[Any]]
) -> None:
    for pairs in run_ranks(both_forms, ranks):
        for overlapped, plain in pairs:
            assert torch.equal(overlapped, plain)


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tp2": ("llama", TP2),
    "gpt2-pp2-zb-tp2": ("gpt2", TP2 | {"pp": 2, "schedule": "zb-h1"}),
    "llama-cp2-tp2": ("llama", TP2 | {"cp": 2}),
    "gpt2-pp2-vpp2-tp2": ("gpt2", TP2 | {"pp": 2, "vpp": 2, "layout": "E|t|t|L"}),
    "llama-tp2-zero3": ("llama", TP2 | {"dp": 2, "zero": 3}),
    "gpt2-tp4-dp2": ("gpt2", TP2 | {"tp": 4, "dp": 2, "zero": 0}),
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[pytest.mark.parity] if index > 1 else [])
        for index, name in enumerate(LAYOUTS)
    ],
)
def test_a_layout_equals_one_rank(layout: str, steps: int) -> None:
    model, parallel = LAYOUTS[layout]
    compare(MODELS[model], parallel, reference("short", model, steps))


LATENT: dict[str, Any] = {
    name: value for name, value in LLAMA.items() if name != "num_query_groups"
}
LATENT |= {
    "mla": DEEPSEEK["mla"],
    "mtp": {"num_layers": 1},
    "moe": EXPERTS | {"shared_expert_ffn_hidden_size": 32, "layer_pattern": [0, 1]},
}
WIDE = {"precision": "bf16", "fp32_residual_connection": True}
RECOMPUTE: list[dict[str, Any]] = [
    {"granularity": "full", "method": "uniform", "num_layers": 1},
    {"granularity": "operations"},
]


def config_of(
    shape: dict[str, Any], parallel: dict[str, Any], **training: Any
) -> TrainConfig:
    fields = make_config(shape, {"dp": 1} | parallel, steps=1).model_dump()
    fields["training"] |= training
    return TrainConfig.from_mapping(fields)


def test_gradients_are_those_without_overlap_and_do_not_depend_on_recomputation() -> None:
    """With experts, latents, frozen layers, and gradients in a wider type than products."""
    overlapped = config_of(LATENT, TP2)
    configs = [config_of(LATENT, SPLIT), overlapped]
    configs += [with_recompute(overlapped, recompute) for recompute in RECOMPUTE]
    # Input gradients of a frozen layer's products have no weight gradient to wait behind.
    for parallel in (SPLIT, TP2):
        config = config_of(LLAMA, parallel, **WIDE)
        frozen = config.optimizer.model_copy(update={"freeze": ("layers.1.*",)})
        configs.append(config.model_copy(update={"optimizer": frozen}))
    for tensors in run_ranks(gradients, 2, configs, timeout_s=180):
        plain, gradient, *recomputed, frozen_plain, frozen_gradient = tensors
        # Rows of a product may be summed in another order than in a larger one.
        assert distance(gradient, plain) <= 5e-6
        assert distance(frozen_gradient, frozen_plain) <= 2**-8
        for again in recomputed:
            assert torch.equal(again, gradient)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
