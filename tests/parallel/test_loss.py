"""The head's loss and gradients, over vocabularies cut any way, against plain torch in
fp64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.tensor_parallel.cross_entropy import VocabParallelHead
from megatron_ray.tensor_parallel.group import TensorParallel

TOKENS = 24
WIDTH = 16
VOCABULARY = 10
ROWS = 15
"""Three ranks have five rows each, the last one nothing but padding."""


def drawn(spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight, labels, mask.

    With a large `spread` exponentials of one part of the vocabulary are nothing beside
    the other's, and labels are in both.
    """
    generator = torch.Generator().manual_seed(1)
    # Eighths: products are exact in fp32, so that it is not their rounding that is
    # compared.
    hidden, weight = (
        torch.randint(-16, 17, (rows, WIDTH), generator=generator) / 8
        for rows in (TOKENS, VOCABULARY)
    )
    hidden[:, 0] = 1.0
    weight[:, 0] = 0.0
    weight[:5, 0] = spread
    mask = torch.tensor([1.0, 0.3, 0.0, 1.0]).repeat(TOKENS // 4)
    return hidden, weight, torch.arange(TOKENS) % VOCABULARY, mask


def computed(
    rank: int, world_size: int, spread: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden, of this rank's rows of the weight)."""
    hidden, weight, labels, mask = drawn(spread)
    group = dist.group.WORLD if world_size > 1 else None
    rows = ROWS // world_size
    head = VocabParallelHead(
        (rows, WIDTH),
        valid_rows=max(0, min(VOCABULARY - rank * rows, rows)),
        vocabulary=VOCABULARY,
        tp=TensorParallel.of_group(group),
        dtype=dtype,
    )
    padded = torch.cat([weight, torch.zeros(ROWS - VOCABULARY, WIDTH)]).to(dtype)
    head.weight = nn.Parameter(padded.chunk(world_size)[rank].clone())
    leaf = hidden.to(dtype).requires_grad_()
    loss = head(leaf, labels, mask)
    loss.backward()
    assert leaf.grad is not None
    assert head.weight.grad is not None
    return loss.detach(), leaf.grad, head.weight.grad


def expected(spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """From the logits as they are rounded: what large ones have lost is not the loss's
    doing.
    """
    hidden, weight, labels, mask = drawn(spread)
    hidden = hidden.to(dtype)
    weight = weight.to(dtype)
    logits = (hidden @ weight.T).double().requires_grad_()
    loss = (nn.functional.cross_entropy(logits, labels, reduction="none") * mask).sum()
    loss.backward()
    assert logits.grad is not None
    return (
        loss.detach(),
        logits.grad @ weight.double(),
        torch.cat([logits.grad.T @ hidden.double(), torch.zeros(ROWS - VOCABULARY, WIDTH)]),
    )


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("spread", [0.0, 70.0, 500.0])
@pytest.mark.parametrize("ranks", [1, 3])
def test_loss_and_gradients(
    ranks: int,
    spread: float,
    dtype: torch.dtype,
    allowed: float,
    run_ranks: Callable[..., list[Any]],
) -> None:
    answers = (
        run_ranks(computed, ranks, spread, dtype)
        if ranks > 1
        else [computed(0, 1, spread, dtype)]
    )
    loss, grad_hidden, grad_weight = expected(spread, dtype)
    measured = torch.cat([weight for _, _, weight in answers])
    for own_loss, own_hidden, _ in answers:
        assert float(own_loss) == pytest.approx(float(loss), rel=allowed)
        assert float((own_hidden.double() - grad_hidden).norm()) <= allowed * float(
            grad_hidden.norm()
        )
    assert float((measured.double() - grad_weight).norm()) <= allowed * float(
        grad_weight.norm()
    )
    assert not measured[VOCABULARY:].any()
