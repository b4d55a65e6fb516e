"""The tokenizer of a job: the tokens around its documents, and that of its weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ray.config.data import TokenizerConfig
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.config.problem import Problem
from megatron_ray.data.indexed import IndexedDataset
from megatron_ray.data.preparation.check import check_data
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.preparation.given_tokenizer import given_tokenizer
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.tokenizer import Tokenizer
from tests.support.corpus_files import BYTES, config, write, write_prepared
from tests.support.tokenizer_files import byte_tokenizer

GEMMA = byte_tokenizer("<pad>", "<eos>", "<bos>", ordinary=("</s>",))
CHAT = byte_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BPE = TokenizerConfig()


def file(folder: Path, content: str, **changes: Any) -> TokenizerConfig:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(content)
    return TokenizerConfig(kind="file", path=str(folder / "tokenizer.json"), **changes)


def weights(content: str | None, **changes: Any) -> ModelTokenizer:
    values: dict[str, Any] = {"end_of_document": None, "begin_of_document": None}
    return ModelTokenizer("models/a", content, **(values | changes))


def around(config: TokenizerConfig, of: ModelTokenizer | None = None) -> list[str | None]:
    """The begin and the end token of a job's documents."""
    given = given_tokenizer(config, of)
    assert given is not None
    tokenizer = given.tokenizer
    begin = None
    if tokenizer.begin_of_document is not None:
        begin = tokenizer.name_of(tokenizer.begin_of_document)
    return [begin, tokenizer.name_of(tokenizer.end_of_document)]


def problem_of(config: TokenizerConfig, of: ModelTokenizer | None = None) -> Problem:
    with pytest.raises(UnusableDataError) as caught:
        given_tokenizer(config, of)
    (problem,) = caught.value.problems
    return problem


def test_the_files_beside_a_tokenizer_declare_its_end_token(tmp_path: Path) -> None:
    chosen = file(tmp_path, CHAT)
    assert around(chosen) == [None, "<|endoftext|>"]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert around(chosen) == [None, "<|im_end|>"]
    (tmp_path / "config.json").write_text('{"eos_token_id": [257, 258]}')
    assert around(chosen) == [None, "<|im_start|>"]
    (tmp_path / "config.json").write_text("broken")
    assert around(chosen) == [None, "<|im_end|>"]
    named = file(tmp_path, CHAT, end_of_document="<|endoftext|>")
    assert around(named) == [None, "<|endoftext|>"]


def test_a_byte_order_mark_before_a_tokenizer_changes_nothing(tmp_path: Path) -> None:
    chosen = file(tmp_path, "\ufeff" + CHAT)
    settings = b'\xef\xbb\xbf{"eos_token": "<|im_end|>"}'
    (tmp_path / "tokenizer_config.json").write_bytes(settings)
    assert around(chosen) == [None, "<|im_end|>"]
    assert around(chosen, weights(CHAT)) == [None, "<|im_end|>"]
    # Weights without a tokenizer of their own.
    assert around(chosen, weights(None)) == [None, "<|im_end|>"]


def test_a_guess_is_noted_and_a_declaration_is_not(tmp_path: Path) -> None:
    chosen = file(tmp_path, GEMMA)
    given = given_tokenizer(chosen, None)
    assert given is not None
    (note,) = given.notes
    assert note.startswith("the end token '<eos>' is a guess, as no file declares one; set")
    (tmp_path / "config.json").write_text('{"eos_token_id": 257}')
    declared = given_tokenizer(chosen, None)
    assert declared is not None
    assert declared.notes == ()
    bytes_only = given_tokenizer(BYTES, None)
    assert bytes_only is not None
    assert bytes_only.notes == ()


def test_documents_begin_and_end_as_those_of_the_weights(tmp_path: Path) -> None:
    of = weights(GEMMA, end_of_document=257, begin_of_document="<bos>")
    assert around(BPE, of) == ["<bos>", "<eos>"]
    assert around(file(tmp_path, GEMMA), of) == ["<bos>", "<eos>"]
    changes = {"end_of_document": "<pad>", "begin_of_document": ""}
    assert around(file(tmp_path, GEMMA, **changes), of) == [None, "<pad>"]
    # The ids of a model that was published without tokenizer.json hold for one that is made.
    unknown = weights(None, end_of_document=257, other_form="tokenizer.model")
    assert around(file(tmp_path, GEMMA), unknown) == [None, "<eos>"]


def test_a_job_without_a_tokenizer_takes_that_of_its_weights() -> None:
    given = given_tokenizer(BPE, weights(CHAT))
    assert given is not None
    assert given.tokenizer.to_json() == CHAT
    assert "using the tokenizer that the weights of models/a were made with" in given.notes
    assert given_tokenizer(BPE, None) is None


def test_another_tokenizer_than_that_of_the_weights_is_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    trained = Tokenizer.train_bpe(["some words"] * 9, 280).to_json()
    problem = problem_of(file(tmp_path, trained), weights(CHAT))
    assert (problem.pointer, problem.code) == (
        "/data/tokenizer/path",
        "tokenizer_of_weights",
    )
    assert "is not the tokenizer that the weights of models/a were made with" in (
        problem.detail
    )
    assert problem.detail.endswith(
        "set data.tokenizer to {kind: file, path: models/a/tokenizer.json}"
    )
    assert problem_of(BYTES, weights(trained)).pointer == "/data/tokenizer/kind"


@pytest.mark.parametrize("position", ["begin", "end"])
def test_a_tokenizer_without_a_token_around_the_weights_documents_is_refused(
    tmp_path: Path, position: str
) -> None:
    tokens = {"end_of_document": 256, f"{position}_of_document": 257}
    of = weights(byte_tokenizer("<|endoftext|>", "<old>"), **tokens)
    problem = problem_of(file(tmp_path, byte_tokenizer("<|endoftext|>", "<new>")), of)
    assert problem.pointer == f"/data/tokenizer/{position}_of_document"
    assert problem.detail.startswith(
        f"the tokenizer lacks '<old>', the {position} of documents of models/a; set "
        "data.tokenizer to"
    )
    named = {f"{position}_of_document": "<new>"}
    around_new = around(
        file(tmp_path, byte_tokenizer("<|endoftext|>", "<new>"), **named), of
    )
    assert "<new>" in around_new


@pytest.mark.parametrize("chosen", [BPE, BYTES], ids=["bpe", "bytes"])
def test_a_made_up_tokenizer_is_refused_for_weights_with_an_unread_one(
    chosen: TokenizerConfig,
) -> None:
    problem = problem_of(chosen, weights(None, other_form="tokenizer.model"))
    assert (problem.pointer, problem.code) == (
        "/data/tokenizer/kind",
        "tokenizer_of_weights",
    )
    assert "its tokenizer is in tokenizer.model, which is not read" in problem.detail
    assert "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)" in problem.detail


def test_weights_without_any_tokenizer_can_be_trained_with_a_chosen_one_only() -> None:
    problem = problem_of(BPE, weights(None))
    assert problem.code == "tokenizer_of_weights"
    assert problem.detail.endswith(
        "download the tokenizer.json that they were made with and set data.tokenizer to "
        "{kind: file, path: FOLDER/tokenizer.json}, or to {kind: bytes} if they were made with "
        "bytes"
    )
    assert around(BYTES, weights(None, end_of_document=2)) == [None, "<|endoftext|>"]


def test_a_tokenizer_made_for_weights_without_one_begins_documents_too(
    tmp_path: Path,
) -> None:
    made = file(tmp_path, byte_tokenizer("<s>", "</s>", begin="<s>"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 257}')
    of = weights(None, other_form="tokenizer.model")
    assert around(made, of) == ["<s>", "</s>"]
    assert around(made.model_copy(update={"begin_of_document": ""}), of) == [None, "</s>"]
    # A model that is new has no documents to follow.
    assert around(made) == [None, "</s>"]


def test_what_files_do_not_settle_is_noted_unless_the_job_does(tmp_path: Path) -> None:
    of = weights(CHAT, end_of_document="<|im_end|>", end_note="ends", begin_note="begins")
    given = given_tokenizer(BPE, of)
    assert given is not None
    assert given.notes[1:] == ("ends", "begins")
    chosen = file(
        tmp_path, CHAT, end_of_document="<|endoftext|>", begin_of_document="<|im_start|>"
    )
    given = given_tokenizer(chosen, of)
    assert given is not None
    assert given.notes == ()


def test_a_tokenizer_that_nothing_confirms_is_noted(tmp_path: Path) -> None:
    given = given_tokenizer(file(tmp_path, CHAT), weights(None, end_of_document=256))
    assert given is not None
    (note,) = given.notes
    assert note.startswith("the weights of models/a come without a tokenizer.json, so ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("begin_of_document", "<s>"),
        ("end_of_document", "</s>"),
        ("special_tokens_in_text", ("<|im_start|>",)),
    ],
)
def test_names_that_the_tokenizer_of_bytes_lacks_are_refused_at_their_field(
    field: str, value: Any
) -> None:
    changed = TokenizerConfig.model_validate({"kind": "bytes", field: value})
    problem = problem_of(changed)
    assert problem.pointer == f"/data/tokenizer/{field}"
    assert problem.detail.startswith("kind bytes: the tokenizer has no ")


def test_a_tokenizer_is_trained_with_the_tokens_that_are_named(tmp_path: Path) -> None:
    texts = [f"<|im_start|>question {number}<|im_end|>" for number in range(60)]
    corpus = write(tmp_path / "c.jsonl", texts)
    tokenizers = []
    for names in (("<|im_start|>", "<|im_end|>"), ()):
        tokenizer = TokenizerConfig(
            vocab_size=300, begin_of_document="<s>", special_tokens_in_text=names
        )
        data = config(corpus, tokenizer=tokenizer)
        prepared = prepare(data, str(tmp_path / "cache"), seq_length=4)
        tokenizers.append(prepared.tokenizer_path)
        if names:
            assert prepared.vocab_size <= 300
            first = IndexedDataset(prepared.train[0].prefix)[0].tolist()
            assert first[:2] == [prepared.begin_of_document, 2]
            assert first[-2:] == [3, prepared.end_of_document]
    assert tokenizers[0] != tokenizers[1]


def first_tokens(tmp_path: Path, texts: list[str], **changes: Any) -> list[list[int]]:
    """The first and the last two tokens of the first documents of a corpus."""
    corpus = write(tmp_path / "corpus.jsonl", texts)
    data = config(corpus, tokenizer=file(tmp_path, CHAT, **changes), validation_fraction=0)
    prepared = prepare(data, str(tmp_path / "cache"), seq_length=4)
    tokens = IndexedDataset(prepared.train[0].prefix)
    return [tokens[number].tolist() for number in range(len(tokens))]


def test_every_document_begins_and_ends_with_its_tokens_once(tmp_path: Path) -> None:
    changes = {"begin_of_document": "<|im_start|>", "end_of_document": "<|im_end|>"}
    assert first_tokens(tmp_path, ["ab", "cd"], **changes) == [
        [257, 97, 98, 258],
        [257, 99, 100, 258],
    ]
    named = {"special_tokens_in_text": ("<|im_start|>", "<|im_end|>")}
    texts = ["<|im_start|>ab", "cd<|im_end|>"]
    assert first_tokens(tmp_path, texts, **changes, **named) == [
        [257, 97, 98, 258],
        [257, 99, 100, 258],
    ]


def test_a_long_document_begins_once(tmp_path: Path) -> None:
    text = ("a" * 999 + "\n") * 600
    (document,) = first_tokens(tmp_path, [text], begin_of_document="<|im_start|>")
    assert len(document) == len(text) + 2
    assert (document[0], document.count(257), document[-1]) == (257, 1, 256)


def test_what_changes_the_tokens_changes_the_cache_and_the_first_document_is_shown(
    tmp_path: Path,
) -> None:
    corpus = write(tmp_path / "c.jsonl", ["<|im_start|>hi<|im_end|> there"] * 3)
    shown = set()
    prefixes = set()
    for changes in (
        {},
        {"special_tokens_in_text": "all"},
        {"special_tokens_in_text": ["<|im_end|>"]},
        {"begin_of_document": "<|im_start|>"},
    ):
        tokenizer = file(tmp_path, CHAT, **changes)
        data = config(corpus, tokenizer=tokenizer, validation_fraction=0)
        prepared = prepare(data, str(tmp_path / "cache"), seq_length=4)
        assert prepare(data, str(tmp_path / "cache"), seq_length=4) == prepared
        shown.add(prepared.first_document)
        prefixes.add(prepared.train[0].prefix)
    assert len(shown) == len(prefixes) == 4
    assert (
        f"first document of {corpus}: 257 '<|im_start|>', 104 'h', 105 'i', "
        "258 '<|im_end|>', 32 ' ', 116 't', 104 'h', 101 'e', 114 'r', 101 'e', "
        "256 '<|endoftext|>'"
    ) in shown


def test_a_model_with_too_few_rows_is_found_without_tokenizing(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", [f"words {number}" for number in range(60)])
    larger = byte_tokenizer("<|endoftext|>", "<pad>")
    data = config(corpus, tokenizer=file(tmp_path, larger))
    assert check_data(data, 4, str(tmp_path), rows=257).problems == []
    assert prepare(data, str(tmp_path / "cache"), seq_length=4, rows=257).rows == 257
    data = config(corpus, tokenizer=file(tmp_path, larger, special_tokens_in_text="all"))
    (problem,) = check_data(data, 4, str(tmp_path), rows=257).problems
    assert (problem.pointer, problem.code) == ("/model/vocab_size", "vocab_fits")
    assert problem.detail == (
        "model.vocab_size=257 is smaller than the tokenizer's 258, whose last token is "
        "'<pad>'; raise it, or leave it out"
    )
    with pytest.raises(UnusableDataError, match="smaller than the tokenizer's 258"):
        prepare(data, str(tmp_path / "other"), seq_length=4, rows=257)
    assert not list((tmp_path / "other").glob("corpora/*"))


def test_prepared_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    prefix = write_prepared(tmp_path / "c", [[[1, 2, 3, 257, 256]]])
    larger = byte_tokenizer("<|endoftext|>", "<pad>")
    data = config(prefix, tokenizer=file(tmp_path, larger), validation_fraction=0)
    cache = str(tmp_path / "cache")
    assert prepare(data, cache, seq_length=4).vocab_size == 258
    with pytest.raises(UnusableDataError, match="holds token 257, but "):
        prepare(data, cache, seq_length=4, rows=257)


def test_prepared_tokens_need_no_tokenizer_of_their_own_beside_that_of_the_weights(
    tmp_path: Path,
) -> None:
    prefix = write_prepared(tmp_path / "c", [[[1, 2, 3, 4, 256]]])
    data = config(prefix, tokenizer=BPE, validation_fraction=0)
    prepared = prepare(data, str(tmp_path / "cache"), seq_length=4, weights=weights(CHAT))
    assert json.loads(Path(prepared.tokenizer_path).read_text()) == json.loads(CHAT)
    assert np.array_equal(
        IndexedDataset(prepared.train[0].prefix)[0], np.array([1, 2, 3, 4, 256])
    )
