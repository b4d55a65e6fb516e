"""Tokenizers: nothing lost, nothing smuggled in, every refusal worded."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models

from megatron_ray.data.tokenizer import END_OF_DOCUMENT, Tokenizer, TokenizerError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    add(i, i)\n",
    "größer als 日本",
] * 5
BPE = Tokenizer.train_bpe(TEXTS, 290)
BYTES = Tokenizer.of_bytes()

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.just(
    f"a{END_OF_DOCUMENT}b"
)


@settings(deadline=None)
@given(text=any_text)
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(text=any_text)
def test_bytes_are_bytes(text: str) -> None:
    assert BYTES.encode(text) == list(text.encode())


def test_sizes_and_ends() -> None:
    assert (BYTES.vocab_size, BYTES.end_of_document) == (257, 256)
    assert (BPE.vocab_size, BPE.end_of_document) == (290, 0)
    assert BPE.decode([BPE.end_of_document]) == END_OF_DOCUMENT
    assert len(BPE.encode(TEXTS[0])) < len(BYTES.encode(TEXTS[0]))


def test_a_small_corpus_gives_a_small_vocabulary() -> None:
    assert Tokenizer.train_bpe(["ab"], 5000).vocab_size < 300


def test_training_is_deterministic() -> None:
    assert Tokenizer.train_bpe(TEXTS, 290).to_json() == BPE.to_json()


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert BPE.decode(BPE.encode("a\ud800b")) == "a?b"
    assert Tokenizer.train_bpe(["\ud800"], 257).vocab_size == 257


def test_batches_equal_single_texts() -> None:
    assert BPE.encode_batch(TEXTS) == [BPE.encode(text) for text in TEXTS]
    assert BPE.encode_batch([]) == []


def test_save_and_load(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    for loaded in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        Tokenizer.load(tmp_path / "tokenizer.json", 0),
    ):
        assert loaded.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
        assert loaded.end_of_document == 0


def test_a_byte_order_mark_changes_nothing_in_a_tokenizer() -> None:
    plain = Tokenizer.of_bytes().to_json()
    assert Tokenizer.from_json("\ufeff" + plain).to_json() == plain


def test_settings_of_other_uses_are_dropped() -> None:
    inner = Inner.from_str(BPE.to_json())
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    assert Tokenizer.from_json(inner.to_str()).encode(TEXTS[0]) == BPE.encode(TEXTS[0])


def words(*names: str) -> str:
    return str(
        Inner(
            models.WordLevel(
                {name: 2 * number for number, name in enumerate(names)}, unk_token=names[0]
            )
        ).to_str()
    )


def test_end_token_by_name_by_guess_and_with_holes_in_the_ids() -> None:
    assert Tokenizer.from_json(words("a", "</s>", "stop")).end_of_document == 2
    chosen = Tokenizer.from_json(words("a", "</s>", "stop"), "stop")
    assert (chosen.end_of_document, chosen.vocab_size) == (4, 5)


@pytest.mark.parametrize(
    ("text", "end", "code", "field", "message"),
    [
        (
            "{",
            None,
            "bad_tokenizer",
            "path",
            "not a Hugging Face tokenizer.json: .*; save one with",
        ),
        (
            json.dumps({"model": {}}),
            None,
            "bad_tokenizer",
            "path",
            "not a Hugging Face tokenizer.json",
        ),
        (
            str(Inner(models.BPE()).to_str()),
            None,
            "bad_tokenizer",
            "path",
            "has no tokens; train it first",
        ),
        (
            words("a", "b"),
            None,
            "no_end_token",
            "end_of_document",
            r"none of the usual end tokens \(<\|endoftext\|>, .*set end_of_document",
        ),
        (
            words("a", "b"),
            "stop",
            "no_end_token",
            "end_of_document",
            "has no token 'stop'; name the token that ends a document",
        ),
    ],
)
def test_refusals(text: str, end: str | None, code: str, field: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_json(text, end)
    assert (caught.value.code, caught.value.field) == (code, field)
