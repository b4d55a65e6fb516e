"""When a tokenizer may replace the one that weights were made with."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.data.tokenizer_match import find_difference
from tests.support.tokenizer_files import byte_tokenizer

ORIGINAL = byte_tokenizer("<s>", "</s>", "<reserved>")
TRAINED = Tokenizer.train_bpe(["hello world, hello"] * 3, 290).to_json()


def edited(change: Callable[[dict[str, Any]], object], content: str = ORIGINAL) -> str:
    values = json.loads(content)
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "other",
    [
        json.dumps(json.loads(ORIGINAL), indent=3),
        byte_tokenizer("<s>", "</s>", "<|im_start|>"),
        byte_tokenizer("<s>", "</s>", "<reserved>", "<more>"),
        edited(lambda values: values.update(post_processor=None, decoder=None)),
        edited(lambda values: values.update(padding=None, truncation=None)),
    ],
    ids=["written otherwise", "renamed", "added", "surroundings", "settings"],
)
def test_what_gives_the_same_tokens_is_the_same(other: str) -> None:
    assert find_difference(ORIGINAL, other) is None


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (byte_tokenizer("</s>", "<s>", "<reserved>"), "token '<s>' is 257 instead of 256"),
        (TRAINED, "token .* instead of"),
        (
            edited(lambda values: values.update(normalizer={"type": "Lowercase"})),
            "its normalizer differs",
        ),
        (
            edited(lambda values: values["pre_tokenizer"].update(add_prefix_space=True)),
            "its pre_tokenizer differs",
        ),
    ],
    ids=["order", "vocabulary", "normalizer", "pre-tokenizer"],
)
def test_what_gives_other_tokens_is_another(other: str, difference: str) -> None:
    assert re.search(difference, find_difference(ORIGINAL, other) or "")


def test_trained_tokenizers_of_equal_size_differ_by_their_words() -> None:
    other = Tokenizer.train_bpe(["servus planet, servus"] * 3, 290).to_json()
    assert find_difference(TRAINED, other) is not None
    assert find_difference(TRAINED, TRAINED) is None


def test_lost_merges_are_another_tokenizer() -> None:
    fewer = edited(lambda values: values["model"].update(merges=[]), TRAINED)
    difference = find_difference(TRAINED, fewer)
    assert difference is not None
    assert difference.startswith("its merges differ, such as '")
