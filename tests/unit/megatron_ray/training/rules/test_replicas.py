"""Digests of parameters, and which replica is wrong."""

import pytest
import torch

from megatron_ray.training.rules.replicas import digest, find_difference

NAMES = ("embedding", "head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 1000, 1024, 5000])
def test_any_flipped_bit_changes_the_digest(dtype: torch.dtype, size: int) -> None:
    flat = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = digest(flat)
    bits = flat.view(torch.int32 if dtype is torch.float32 else torch.int16)
    for index in {0, size // 2, size - 1}:
        for bit in (0, 7, 14):
            bits[index] ^= 1 << bit
            assert not torch.equal(digest(flat), before)
            bits[index] ^= 1 << bit
    assert torch.equal(digest(flat), before)


def test_swapped_numbers_change_the_digest() -> None:
    assert not torch.equal(
        digest(torch.tensor([1.0, 2.0])), digest(torch.tensor([2.0, 1.0]))
    )


@pytest.mark.parametrize(
    ("values", "rank", "words"),
    [
        ([0, 0, 1], 6, "rank 6 has other weights in head than 2 of its 3 replicas"),
        ([1, 0, 0], 2, "rank 2 has other weights in head than 2 of its 3 replicas"),
        ([0, 1], None, "on ranks 2, 4 have different weights in head, and which of them"),
        ([0, 1, 2], None, "on ranks 2, 4, 6 have different weights in head"),
    ],
)
def test_the_odd_one_out_is_wrong(values: list[int], rank: int | None, words: str) -> None:
    ranks = [2, 4, 6][: len(values)]
    digests = [[(7, 7), (value, 3)] for value in values]
    faulty, sentence = find_difference(NAMES, ranks, digests)
    assert faulty == rank
    assert words in sentence
