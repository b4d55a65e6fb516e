"""What the manifest has beside the tokens: names of sources, and notes."""

from pathlib import Path

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared_length import num_prepared_tokens
from tests.support.corpus_files import (
    BYTES,
    TEXTS,
    assert_refused,
    config,
    write,
    write_prepared,
)


def test_sources_are_named_in_the_manifest(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / corpus.name, TEXTS)
    data = DataConfig(
        train=(
            DataSource(path=str(corpus), name="mine"),
            DataSource(path=str(other)),
        ),
        tokenizer=BYTES,
        validation_fraction=0.1,
    )
    prepared = prepare(data, str(tmp_path / "cache"), seq_length=8)
    names = ["mine", corpus.name]
    assert [part.name for part in prepared.train] == names
    assert [part.name for part in prepared.validation] == names


def test_another_share_than_asked_for_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [letter * 20 for letter in "abcdefg"])
    data = config(path, validation_fraction=0.05)
    messages: list[str] = []
    for _ in range(2):
        cache = str(tmp_path / "cache")
        (note,) = prepare(data, cache, seq_length=8, progress=messages.append).notes
        assert messages[-1] == note
        assert note.startswith(f"{path}: 14.3% of the tokens")
    assert "of the tokens are held out instead of 5.0%" in note


def test_documents_that_cannot_be_told_apart_are_not_separated(tmp_path: Path) -> None:
    packed = write_prepared(tmp_path / "packed", [[list(range(50))]])
    separated = {"separate_documents": True, "validation_fraction": 0}
    assert_refused(
        config(packed, **separated),
        tmp_path / "cache",
        "/data/separate_documents",
        "no_borders",
        "packed holds no end token 256, and its index is of a single document, .* set "
        "separate_documents to false",
    )
    # A source that has borders is enough for a blend, and an end token for a source.
    indexed = write_prepared(tmp_path / "indexed", [[[1, 2, 7]], [[3, 4, 5, 6, 7]]])
    both = prepare(config(packed, indexed, **separated), str(tmp_path / "c"), seq_length=4)
    assert len(both.notes) == 2
    assert "so separate_documents cannot see where they end" in both.notes[0]
    assert "separate_documents" not in both.notes[1]
    ended = write_prepared(tmp_path / "ended", [[[1, 2, 256, 3, 4, 5, 256]]])
    assert not prepare(config(ended, **separated), str(tmp_path / "c"), seq_length=4).notes


def test_data_with_another_end_token_are_noted(tmp_path: Path) -> None:
    prefix = write_prepared(tmp_path / "ready", [[[n, 1, 7]] for n in range(20)])
    (note,) = prepare(config(prefix), str(tmp_path / "cache"), seq_length=4).notes
    assert "ready holds no end token 256, so a model" in note
    assert "its documents end with token 7: if that is their end token, set data" in note
    different = write_prepared(tmp_path / "other", [[[n, 1, n]] for n in range(20)])
    (note,) = prepare(config(different), str(tmp_path / "cache"), seq_length=4).notes
    assert "documents end with" not in note
    # An end token may occur in data of another tokenizer, where it is another word.
    mixed = write_prepared(tmp_path / "mixed", [[[n, 256, 7]] for n in range(20)])
    (note,) = prepare(config(mixed), str(tmp_path / "cache"), seq_length=4).notes
    assert "its documents end with token 7, not with the end token 256: if that" in note


def test_data_that_do_not_begin_as_prompts_will_are_noted(tmp_path: Path) -> None:
    plain = write_prepared(tmp_path / "plain", [[[n, 1, 256]] for n in range(20)])
    begun = write_prepared(tmp_path / "begun", [[[256, n, 1, 256]] for n in range(20)])
    data = config(plain, begun, validation_fraction=0)
    (note,) = prepare(data, str(tmp_path / "cache"), seq_length=4).notes
    assert note == (
        f"{begun}: its documents begin with token 256, and prompts will not; set "
        "data.tokenizer.begin_of_document to '<|endoftext|>'"
    )
    bytes_begun = TokenizerConfig(kind="bytes", begin_of_document="<|endoftext|>")
    data = config(plain, begun, validation_fraction=0, tokenizer=bytes_begun)
    (note,) = prepare(data, str(tmp_path / "cache"), seq_length=4).notes
    assert note.startswith(
        f"{plain}: not all its documents begin with token 256, as prompts"
    )


def test_a_tokenizer_without_special_tokens_for_text_is_noted(
    tmp_path: Path, corpus: Path
) -> None:
    tokenizer = TokenizerConfig(kind="bytes", special_tokens_in_text="all")
    (note,) = prepare(
        config(corpus, tokenizer=tokenizer), str(tmp_path / "cache"), seq_length=8
    ).notes
    assert note.startswith("data.tokenizer.special_tokens_in_text=all has no effect, as")
    named = TokenizerConfig(kind="bytes", special_tokens_in_text=("<|endoftext|>",))
    data = config(corpus, tokenizer=named)
    assert prepare(data, str(tmp_path / "cache"), seq_length=8).notes == ()


def test_a_field_of_data_without_fields_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 20)
    lines = write(tmp_path / "b.jsonl", TEXTS)
    prefix = write_prepared(tmp_path / "ready", [[[n, 1, 256]] for n in range(20)])
    sources = []
    for path in (tmp_path / "a.txt", prefix):
        sources.append(DataSource(path=str(path), text_key="body"))
    data = DataConfig(
        train=(*sources, DataSource(path=str(lines))),
        tokenizer=BYTES,
        validation_fraction=0,
    )
    assert prepare(data, str(tmp_path / "cache"), seq_length=8).notes == (
        f"{tmp_path}/a.txt has no fields, so text_key='body' has no effect",
        f"{prefix} has no fields, so text_key='body' has no effect",
    )


def test_the_length_of_prepared_data_is_known_without_reading_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    cache = str(tmp_path / "cache")
    data = config(path)
    assert num_prepared_tokens(data, cache) is None
    assert not Path(cache).exists()
    prepared = prepare(data, cache, seq_length=8)
    assert num_prepared_tokens(data, cache) == prepared.num_train_tokens
    assert num_prepared_tokens(config(path, validation_fraction=0.2), cache) is None
    write(path, [*TEXTS, "one more"])
    assert num_prepared_tokens(data, cache) is None, "the text is another one"
    path.unlink()
    assert num_prepared_tokens(data, cache) is None
    assert num_prepared_tokens(data, "nosuch://cache") is None
