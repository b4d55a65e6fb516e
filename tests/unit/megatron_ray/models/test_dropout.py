"""Masks have their rate and belong to one place only; attention with dropout is softmax
attention; only training drops anything.
"""

from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.distributed.rng import Streams
from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.batch import Batch, Packed
from megatron_ray.models.dropout import AttentionWithDropout, Dropout
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.models.gpt import GPT
from megatron_ray.training.session import batch_maker, build
from tests.support.packed_rows import packed_rows
from tests.support.parity import LLAMA, RandomDataset, make_config

HERE = Streams(7, {"tp": 0, "cp": 0})
WHERE = HERE.stream("layers.0.mlp", ("cp", "tp"))


def mask(
    rate: float = 0.3,
    streams: Streams = HERE,
    place: str = "layers.0.mlp",
    cut_by: tuple[str, ...] = ("cp",),
    sample: int = 0,
) -> Tensor:
    return Dropout(rate, streams.stream(place, cut_by)).mask(torch.empty(400, 250), sample)


def correlation(left: Tensor, right: Tensor) -> float:
    """In standard deviations of independent masks."""
    return float(
        torch.corrcoef(torch.stack([left.flatten(), right.flatten()]).double())[0, 1]
    ) * sqrt(left.numel())


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_a_mask_drops_at_its_rate(rate: float) -> None:
    dropped = mask(rate)
    assert abs(float(dropped.double().mean()) - rate) < 4 * sqrt(
        rate * (1 - rate) / dropped.numel()
    )


def test_masks_differ_by_place_sample_seed_and_cut_and_by_nothing_else() -> None:
    drawn = mask()
    assert torch.equal(drawn, mask())
    other_tp_rank = mask(streams=Streams(7, {"tp": 1, "cp": 0}))
    assert torch.equal(drawn, other_tp_rank), "tp does not cut this"
    others = [
        mask(place="layers.1.mlp"),
        mask(place="layers.0.attention"),
        mask(sample=2),
        mask(streams=Streams(8, {"tp": 0, "cp": 0})),
        mask(streams=Streams(7, {"tp": 0, "cp": 1})),
        mask(cut_by=("cp", "tp")),
        mask(cut_by=("cp", "tp"), streams=Streams(7, {"tp": 1, "cp": 0})),
    ]
    both = [drawn, *others]
    assert all(
        abs(correlation(left, right)) < 4
        for index, left in enumerate(both)
        for right in both[:index]
    )


def test_what_is_left_keeps_the_mean() -> None:
    x = Dropout(0.25, WHERE)(torch.ones(400, 250), 3)
    assert set(x.unique().tolist()) == {0.0, float(torch.tensor(1.0) * (1 / 0.75))}
    assert abs(float(x.mean()) - 1) < 4 * sqrt(1 / 3 / x.numel())


def qkv(dtype: torch.dtype, groups: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, heads, 24, 16, generator=draw, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in (4, groups, groups)
    ]


@pytest.mark.parametrize(
    "packed",
    [None, packed_rows((10, 14), (24,))],
)
def test_attention_that_drops_nothing_is_attention(packed: Packed | None) -> None:
    inputs = qkv(torch.float64)
    again = qkv(torch.float64)
    attention = LocalAttention(DeviceKind("cpu", bf16_products=True))
    measured = AttentionWithDropout(0.0, WHERE)(*inputs, packed, 0)
    expected = attention(*again, packed)
    torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-12)
    for output in (measured, expected):
        (output * torch.linspace(0, 1, 16, dtype=torch.float64)).sum().backward()
    for one, other in zip(inputs, again, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
)
def test_dropped_probabilities_count_for_nothing_and_the_others_for_more(
    dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = (x.detach() for x in qkv(dtype))
    core = AttentionWithDropout(0.4, WHERE)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / 4
    probabilities = scores.masked_fill(
        torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf
    ).softmax(-1)
    kept = probabilities.masked_fill(core.dropout.mask(probabilities, 5), 0) / 0.6
    expected = kept @ v.double().repeat_interleave(2, 1)
    torch.testing.assert_close(
        core(q, k, v, None, 5).double(), expected, rtol=tolerance, atol=tolerance
    )


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def model_and_batch(**dropout: float) -> tuple[GPT, Batch]:
    config: TrainConfig = make_config(LLAMA | dropout, {"dp": 1}, steps=1)
    mesh = ParallelMesh.single()
    model, _ = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 4, 0, 1, batch_maker(config, mesh)
    )
    return model.module, loader.step(0)[1]


def test_a_rate_of_zero_adds_no_module_and_no_operation() -> None:
    model, batch = model_and_batch()
    assert not any(
        isinstance(module, Dropout | AttentionWithDropout) for module in model.modules()
    )
    with Operations() as training:
        loss = model(batch)
    with Operations() as evaluation:
        without = model(batch, ForwardMode.EVAL)
    assert torch.equal(loss, without)
    assert training.names == evaluation.names
    assert batch.first_sample == 2


def test_evaluation_and_generation_drop_nothing() -> None:
    plain, batch = model_and_batch()
    dropping, _ = model_and_batch(hidden_dropout=0.3, attention_dropout=0.2)
    with torch.no_grad():
        assert torch.equal(dropping(batch, ForwardMode.EVAL), plain(batch))
        assert torch.equal(
            dropping.logits(batch.tokens_BS, batch.position_ids),
            plain.logits(batch.tokens_BS, batch.position_ids),
        )
        assert not torch.equal(dropping(batch), plain(batch))


@pytest.mark.parametrize("dropout", [{"hidden_dropout": 0.3}, {"attention_dropout": 0.3}])
def test_training_with_dropout_needs_a_sample_number(dropout: dict[str, float]) -> None:
    model, batch = model_and_batch(**dropout)
    with pytest.raises(ValueError, match="first_sample"):
        model(replace(batch, first_sample=None))


@pytest.mark.parametrize("dropout", [{"hidden_dropout": 0.3}, {"attention_dropout": 0.3}])
def test_a_forward_is_a_function_of_its_batch_and_touches_no_global_generator(
    dropout: dict[str, float],
) -> None:
    model, batch = model_and_batch(**dropout)
    before = torch.get_rng_state()
    loss = model(batch)
    torch.manual_seed(99)
    assert torch.equal(model(batch), loss)
    assert not torch.equal(model(replace(batch, first_sample=4)), loss)
    torch.set_rng_state(before)
    model(batch)
    assert torch.equal(torch.get_rng_state(), before)
