"""The largest attention logit equals that of a loop over all pairs in double precision."""

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_ray.training.callbacks import attention_logits
from megatron_ray.training.callbacks.attention_logits import Visibility, largest_logit


def plain(
    q: Tensor, k: Tensor, places: list[int], keys: list[int], **limits: Tensor
) -> float:
    """Over every pair that sees each other, one by one."""
    window = limits.get("window")
    documents = limits.get("documents")
    logits = list[float]()
    repeats = q.shape[1] // k.shape[1]
    for row, head in product(range(q.shape[0]), range(q.shape[1])):
        for i, j in product(range(len(places)), range(len(keys))):
            here = places[i]
            there = keys[j]
            if there > here or (window is not None and there <= here - int(window)):
                continue
            if documents is not None and documents[row, here] != documents[row, there]:
                continue
            query = q[row, head, i].double()
            logits.append(float(query @ k[row, head // repeats, j].double()))
    return max(logits) / float(q.shape[-1]) ** 0.5


@pytest.mark.parametrize("block", [1 << 24, 100])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("separates", [False, True])
def test_logits_of_pairs_that_see_each_other(
    block: int, window: int | None, separates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_logits, "_BLOCK", block)
    torch.manual_seed(3)
    # This rank's queries are those of a late and an early part of the sequence.
    places = [0, 1, 6, 7]
    keys = [0, 1, 6, 7, 2, 3, 4, 5]
    q = torch.randn(2, 4, len(places), 8)
    k = torch.randn(2, 2, len(keys), 8)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    limits = {}
    if window is not None:
        limits["window"] = torch.tensor(window)
    if separates:
        limits["documents"] = documents
    visibility = Visibility(
        torch.tensor(places), torch.tensor(keys), window, documents if separates else None
    )
    expected = plain(q, k, places, keys, **limits)
    assert float(largest_logit(q, k, visibility)) == pytest.approx(expected, rel=1e-6)
