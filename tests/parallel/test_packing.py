"""Documents that share a sample and are kept apart give what they give one by one,
whole or cut.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.data.loader import BatchMaker
from megatron_ray.models.batch import Batch
from megatron_ray.sharding.sequence_split import SequenceCut
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support import parity
from tests.support.parity import (
    END,
    GPT2,
    LLAMA,
    RandomDataset,
    assemble,
    boxes,
    make_config,
    make_mesh,
    split_vanishing,
    worst_relative_l2,
)
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2-p2p": {"cp": 2},
    "cp2-all-gather": {"cp": 2, "cp_method": "all_gather"},
    "cp2-a2a": {"cp": 2, "cp_method": "a2a"},
    "cp4-hierarchical": {"cp": 4, "cp_method": "a2a+p2p", "hierarchical_cp_sizes": (2, 2)},
    "pp2-tp2-sp": {"pp": 2, "tp": 2, "sequence_parallel": True},
}


def samples(rows: int = 4) -> np.ndarray:
    dataset = RandomDataset(259, 32, ends=0.15)
    return np.stack([dataset[index] for index in range(rows)])


def test_a_packed_batch_says_which_documents_it_has() -> None:
    batch = BatchMaker(CPU, end_of_document=END)(
        np.array([[1, 2, END, 3, 4, 5, END, 6, 7, 8]])[:, [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    )
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.packed is not None
    assert batch.packed.lengths == ((3, 4, 1),)
    assert batch.packed.cu_seqlens.tolist() == [0, 3, 7, 8]
    assert batch.packed.longest == 4
    assert batch.packed.documents_BS.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3]]
    assert batch.loss_mask_BS.tolist() == [[1, 1, 0, 1, 1, 1, 0, 1]]
    assert batch.num_tokens == 6


def test_mtp_labels_stay_in_the_sample_and_in_the_document() -> None:
    tokens = np.array([[1, 2, END, 3, 4, 5, END, 6, 8]])
    targets = BatchMaker(CPU, end_of_document=END, num_mtp_layers=2)(tokens).mtp_targets
    assert targets is not None
    assert targets.labels_DBS.tolist() == [
        [[END, 3, 4, 5, END, 6, 8, 8]],
        [[3, 4, 5, END, 6, 8, 8, 8]],
    ]
    assert targets.loss_mask_DBS.tolist() == [
        [[1, 0, 0, 1, 1, 0, 0, 0]],
        [[0, 0, 0, 1, 0, 0, 0, 0]],
    ]
    together = BatchMaker(CPU, num_mtp_layers=2)(
        np.concatenate([tokens, tokens]), counted_rows=1
    ).mtp_targets
    assert together is not None
    assert together.loss_mask_DBS.tolist() == [
        [[1] * 7 + [0], [0] * 8],
        [[1] * 6 + [0] * 2, [0] * 8],
    ]


def test_a_cut_batch_has_the_tokens_of_its_two_chunks() -> None:
    whole = BatchMaker(CPU, end_of_document=END, num_mtp_layers=2)(samples())
    parts = []
    for rank in range(2):
        part = BatchMaker(CPU, SequenceCut(2, rank), END, num_mtp_layers=2)(samples())
        here = torch.tensor(
            [*range(8 * rank, 8 * rank + 8), *range(24 - 8 * rank, 32 - 8 * rank)]
        )
        for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, here]), name
        for name in ("labels_DBS", "loss_mask_DBS"):
            assert torch.equal(
                getattr(part.mtp_targets, name),
                getattr(whole.mtp_targets, name)[:, :, here],
            ), name
        parts.append(part.num_tokens)
    assert sum(parts) == whole.num_tokens


def gradients(
    model: dict[str, Any], batches: list[Batch], precision: str
) -> tuple[float, dict[str, np.ndarray]]:
    config = make_config(model, {"dp": 1}, steps=1, precision=precision)
    mesh = make_mesh(0, 1, config)
    parallel, optimizer = build(config, mesh)
    loss = forward_backward(parallel, mesh, batches)
    reduce_step(parallel, optimizer, mesh, loss, 1)
    return float(loss), split_vanishing(
        config, assemble(config, [boxes(optimizer.sharded_gradients())])
    )[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_packed_documents_equal_the_documents_one_by_one(
    model: dict[str, Any], precision: str
) -> None:
    rows = samples()
    packed = BatchMaker(CPU, end_of_document=END)(rows)
    assert packed.packed is not None
    assert max(map(len, packed.packed.lengths)) > 3
    apart = []
    for row, lengths in zip(rows, packed.packed.lengths, strict=True):
        for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            one = BatchMaker(CPU)(row[None, start : start + length + 1])
            apart.append(
                replace(one, loss_mask_BS=one.loss_mask_BS * (one.tokens_BS != END))
            )
    loss, measured = gradients(model, [packed], precision)
    expected_loss, expected = gradients(model, apart, precision)
    assert loss == pytest.approx(expected_loss, rel=1e-6 if precision == "fp32" else 1e-3)
    # bf16 rounds products of other shapes otherwise; the bound is that of two orders of
    # summation.
    assert worst_relative_l2(measured, expected)[0] <= (
        5e-6 if precision == "fp32" else 3e-2
    )


@pytest.mark.parallel
@pytest.mark.parametrize(
    "layout",
    [
        name if "p2p" in name else pytest.param(name, marks=pytest.mark.parity)
        for name in LAYOUTS
    ],
)
def test_packed_documents_equal_one_rank_under_every_cut(layout: str) -> None:
    def run(parallel: dict[str, Any]) -> list[parity.RankResult]:
        config = make_config(LLAMA, {"dp": 1} | parallel, steps=5, separate_documents=True)
        return run_ranks(
            parity.run_layout,
            int(np.prod([parallel.get(axis, 1) for axis in ("tp", "cp", "pp")])),
            config,
        )

    (one,) = run({})
    cut = run(LAYOUTS[layout])
    config = make_config(LLAMA, {"dp": 1}, steps=5)
    distance = worst_relative_l2(
        assemble(config, [rank.gradients for rank in cut]),
        assemble(config, [one.gradients]),
    )
    assert distance[0] <= 5e-6, distance
    for rank in cut:
        np.testing.assert_allclose(rank.losses, one.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, one.grad_norms, rtol=1e-5)
