"""Tokenizers: nothing lost, nothing smuggled in, every refusal worded."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers

from megatron_ray.config.data import SpecialTokens
from megatron_ray.data.tokenizer import END_OF_DOCUMENT, Tokenizer, TokenizerError
from tests.support.tokenizer_files import byte_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    add(i, i)\n",
    "größer als 日本",
] * 5
BPE = Tokenizer.train_bpe(TEXTS, 290)
BYTES = Tokenizer.of_bytes()
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"

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
    ("names", "ordinary", "end"),
    [
        (("<pad>", "<eos>", "<bos>"), ("</s>",), "<eos>"),
        (("<s>", "</s>"), (), "</s>"),
        (("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), (), "<|end_of_text|>"),
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), (), "<|endoftext|>"),
        (
            ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", DEEPSEEK_END),
            (),
            DEEPSEEK_END,
        ),
        (("<pad>",), ("</s>",), "</s>"),
    ],
    ids=["gemma", "llama2", "llama3", "qwen", "deepseek", "ordinary"],
)
def test_the_guess_knows_how_each_family_spells_its_end_token(
    names: tuple[str, ...], ordinary: tuple[str, ...], end: str
) -> None:
    tokenizer = Tokenizer.from_json(byte_tokenizer(*names, ordinary=ordinary))
    assert tokenizer.name_of(tokenizer.end_of_document) == end


CHAT = byte_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", ordinary=("<b>",))
MARKED = "<|im_start|>a<|im_end|><b><|endoftext|>"


def spelled(name: str) -> list[int]:
    return list(name.encode())


@pytest.mark.parametrize(
    ("recognised", "ids"),
    [
        (
            "none",
            [*spelled("<|im_start|>a<|im_end|>"), 259, *spelled("<|endoftext|>")],
        ),
        ("all", [257, 97, 258, 259, *spelled("<|endoftext|>")]),
        ((), [*spelled("<|im_start|>a<|im_end|>"), 259, *spelled("<|endoftext|>")]),
        (
            ("<|im_start|>",),
            [257, *spelled("a<|im_end|>"), 259, *spelled("<|endoftext|>")],
        ),
        (
            ("<|im_end|>", "<|endoftext|>"),
            [*spelled("<|im_start|>a"), 258, 259, 256],
        ),
    ],
)
def test_special_tokens_in_text_are_those_that_the_user_names(
    recognised: SpecialTokens, ids: list[int]
) -> None:
    tokenizer = Tokenizer.from_json(CHAT, special_tokens_in_text=recognised)
    assert tokenizer.encode(MARKED) == ids
    assert tokenizer.decode(ids) == MARKED
    assert tokenizer.to_json() == Tokenizer.from_json(CHAT).to_json()


def test_an_end_token_is_not_recognised_even_where_it_is_an_ordinary_token() -> None:
    tokenizer = Tokenizer.from_json(CHAT, "<b>", special_tokens_in_text="all")
    assert 259 not in tokenizer.encode("a<b>")
    assert Tokenizer.from_json(CHAT, "<b>").encode("<b>") == spelled("<b>")


def unigram() -> Inner:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "abs</>")]
    return Inner(models.Unigram(pieces, unk_id=0))


def word_level() -> Inner:
    ids = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    inner = Inner(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


@pytest.mark.parametrize(
    ("inner", "text", "ids", "marked"),
    [
        (unigram(), "ab</s>", [2, 3, 5, 6, 4, 7], [2, 3, 1]),
        (word_level(), "a b </s>", [2, 3, 0], [2, 3, 1]),
    ],
    ids=["unigram", "words"],
)
def test_text_holds_no_end_token_where_a_model_looks_words_up(
    inner: Inner, text: str, ids: list[int], marked: list[int]
) -> None:
    inner.add_special_tokens(["<unk>", "</s>", "<more>"])
    content = str(inner.to_str())
    plain = Tokenizer.from_json(content)
    assert plain.encode(text) == ids
    assert plain.to_json() == content
    named = Tokenizer.from_json(content, special_tokens_in_text=("</s>", "<more>"))
    assert named.encode(text) == marked
    assert named.encode("<more>") == [named.vocab_size - 1]


def test_prompts_begin_as_documents_do() -> None:
    plain = Tokenizer.from_json(CHAT)
    assert plain.encode_prompt("a") == [97]
    assert plain.encode_prompt("") == [256]
    begun = Tokenizer.from_json(CHAT, None, "<|im_start|>", "all")
    assert begun.encode_prompt("a") == [257, 97]
    assert begun.encode_prompt("") == [257]
    # Rendered chats hold it already.
    assert begun.encode_prompt("<|im_start|>a") == [257, 97]
    assert Tokenizer.from_json(CHAT, None, "").encode_prompt("a") == [97]


@pytest.mark.parametrize(
    ("changed", "rows"),
    [
        ({}, 257),
        ({"end_of_document": "<pad>"}, 259),
        ({"begin_of_document": "<s>"}, 258),
        ({"special_tokens_in_text": "all"}, 259),
        ({"special_tokens_in_text": ("<s>",)}, 258),
    ],
)
def test_tokens_that_cannot_occur_need_no_row(changed: dict[str, Any], rows: int) -> None:
    content = byte_tokenizer("<|endoftext|>", "<s>", "<pad>")
    tokenizer = Tokenizer.from_json(content, **changed)
    assert (tokenizer.rows_needed, tokenizer.vocab_size) == (rows, 259)


def test_tokens_of_the_models_own_vocabulary_may_always_occur() -> None:
    assert BPE.rows_needed == BPE.vocab_size
    ordinary = byte_tokenizer("<|endoftext|>", ordinary=("<b>",))
    assert Tokenizer.from_json(ordinary).rows_needed == 258


def test_the_beginning_of_a_document_can_be_read() -> None:
    tokenizer = Tokenizer.from_json(CHAT, None, "<|im_start|>")
    assert tokenizer.describe([257, 97, 10]) == "257 '<|im_start|>', 97 'a', 10 '\\n'"
    assert tokenizer.describe([97] * 40).endswith("97 'a', ...")


@pytest.mark.parametrize(
    ("changed", "field", "message"),
    [
        (
            {"begin_of_document": "<s>"},
            "begin_of_document",
            "has no token '<s>'; name the token that begins a document",
        ),
        (
            {"special_tokens_in_text": ("<|im_end|>", "<b>", "<c>")},
            "special_tokens_in_text",
            "has no special token '<c>'; name those that it has, or use all",
        ),
        (
            {"special_tokens_in_text": ("a",)},
            "special_tokens_in_text",
            "has no special token 'a'",
        ),
    ],
)
def test_names_that_the_tokenizer_lacks_are_refused(
    changed: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_json(CHAT, **changed)
    assert caught.value.field == field


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
