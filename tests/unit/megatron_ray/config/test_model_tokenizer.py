"""What the files of a published tokenizer declare about the tokens around a document."""

from typing import Any

import pytest

from megatron_ray.config.model_tokenizer import (
    ModelTokenizer,
    begin_note,
    declared_begin,
    declared_end,
    end_note,
    other_form,
    token_ids,
)

IDS = {"a": 0, "<s>": 1, "</s>": 2, "<eos>": 3}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ],
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
END_ONLY = {"type": "TemplateProcessing", "single": TEMPLATE["single"][1:]}


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"config.json": {"eos_token_id": 3}}, "<eos>"),
        ({"config.json": {"eos_token_id": [2, 3]}}, "</s>"),
        ({"config.json": {"eos_token_id": [99, 3]}}, "<eos>"),
        ({"config.json": {"eos_token_id": None}}, None),
        ({"config.json": {"eos_token_id": []}}, None),
        ({"generation_config.json": {"eos_token_id": [3, 2]}}, "<eos>"),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, "</s>"),
        ({"tokenizer_config.json": {"eos_token": {"content": "<eos>"}}}, "<eos>"),
        ({"special_tokens_map.json": {"eos_token": "<eos>"}}, "<eos>"),
        ({"train_state.json": {"end_of_document": 0}}, "a"),
        ({}, None),
    ],
)
def test_the_end_token_is_the_one_that_a_file_declares(
    files: dict[str, dict[str, Any]], end: str | None
) -> None:
    assert declared_end(files, IDS) == end


def test_the_model_counts_more_than_its_tokenizer_and_unknown_tokens_count_nothing() -> (
    None
):
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": "</s>"},
        "config.json": {"eos_token_id": 3},
    }
    assert declared_end(files, IDS) == "<eos>"
    assert declared_end(files | {"config.json": {"eos_token_id": 99}}, IDS) == "</s>"


@pytest.mark.parametrize(
    ("processor", "end"),
    [
        (TEMPLATE, "</s>"),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}, "</s>"),
        ({"type": "BertProcessing", "cls": ["<s>", 1], "sep": ["<eos>", 3]}, "<eos>"),
        (BYTE_LEVEL, None),
        (None, None),
    ],
)
def test_a_template_ends_documents_where_no_file_declares_their_end(
    processor: dict[str, Any] | None, end: str | None
) -> None:
    tokenizer = {"post_processor": processor}
    assert declared_end({}, IDS, tokenizer) == end
    files = {"config.json": {"eos_token_id": 0}}
    assert declared_end(files, IDS, tokenizer) == "a"


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "is_noted"),
    [
        (2, "<eos>", True),
        ([2, 3], "<eos>", False),
        (3, "<eos>", False),
        (None, "<eos>", False),
        (2, None, False),
        (2, "<gone>", False),
    ],
)
def test_files_that_contradict_each_other_on_the_end_are_noted(
    of_model: int | list[int] | None, of_tokenizer: str | None, is_noted: bool
) -> None:
    files: dict[str, dict[str, Any]] = {
        "config.json": {"eos_token_id": of_model},
        "tokenizer_config.json": {"eos_token": of_tokenizer},
    }
    note = end_note(files, IDS)
    assert (note is not None) == is_noted
    if note is not None:
        assert "name '</s>' as its end token, and those of its tokenizer '<eos>'" in note
        assert "set data.tokenizer.end_of_document" in note


def test_a_template_with_two_begin_tokens_is_noted() -> None:
    two = [*TEMPLATE["single"][:1], *TEMPLATE["single"]]
    tokenizer = {"post_processor": TEMPLATE | {"single": two}}
    assert declared_begin(tokenizer, {}) is None
    note = begin_note(tokenizer)
    assert note is not None
    assert "puts 2 tokens before every text (<s>, <s>)" in note
    assert begin_note({"post_processor": TEMPLATE}) is None


@pytest.mark.parametrize(
    ("processor", "settings", "begin"),
    [
        (TEMPLATE, {}, "<s>"),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}, {}, "<s>"),
        ({"type": "BertProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}, {}, "<s>"),
        (BYTE_LEVEL, {}, None),
        (END_ONLY, {}, None),
        (None, {}, None),
        (BYTE_LEVEL, {"add_bos_token": True, "bos_token": "<s>"}, "<s>"),
        (BYTE_LEVEL, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, "<s>"),
        (BYTE_LEVEL, {"add_bos_token": False, "bos_token": "<s>"}, None),
        (BYTE_LEVEL, {"add_bos_token": True, "bos_token": None}, None),
        (TEMPLATE, {"add_bos_token": False, "bos_token": "<s>"}, "<s>"),
    ],
)
def test_the_begin_token_is_what_the_tokenizer_puts_before_a_text(
    processor: dict[str, Any] | None, settings: dict[str, Any], begin: str | None
) -> None:
    files = {"tokenizer_config.json": settings}
    assert declared_begin({"post_processor": processor}, files) == begin


def test_vocabularies_of_every_model_are_read() -> None:
    added = [{"content": "<s>", "id": 7}]
    unigram = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}, "added_tokens": added}
    assert token_ids(unigram) == {"<unk>": 0, "a": 1, "<s>": 7}
    assert token_ids({"model": {"vocab": {"a": 3}}}) == {"a": 3}


def test_a_tokenizer_in_another_form_is_recognised_by_its_file() -> None:
    assert other_form(["config.json", "tokenizer.model"]) == "tokenizer.model"
    assert other_form(["merges.txt", "vocab.json"]) == "vocab.json"
    assert other_form(["config.json", "qwen.tiktoken"]) == "qwen.tiktoken"
    assert other_form(["config.json"]) is None


def test_tokens_without_a_row_are_noted() -> None:
    content = (
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<x>", "id": 5}]}'
    )
    tokenizer = ModelTokenizer("hf", content, None, None)
    assert tokenizer.rows_note(6) is None
    note = tokenizer.rows_note(5)
    assert note is not None
    assert "tokens up to 5 ('<x>') and the model 5 rows" in note
    assert "model.vocab_size=6 adds rows" in note
