"""Names of sources, and that they differ."""

import pytest
from pydantic import ValidationError

from megatron_ray.config.data import DataConfig, DataSource, source_names


def names_of(*paths: str | tuple[str, str]) -> tuple[str, ...]:
    sources = []
    for path in paths:
        if isinstance(path, tuple):
            sources.append(DataSource(path=path[0], name=path[1]))
        else:
            sources.append(DataSource(path=path))
    return source_names(sources)


def test_a_source_is_named_by_the_end_of_its_path() -> None:
    assert names_of("/a/easy.jsonl", "s3://b/c/hard/") == ("easy.jsonl", "hard")
    assert names_of("builtin://python-stdlib", "/") == ("python-stdlib", "source")
    assert names_of("/a/b c,d", "data") == ("b_c_d", "data")
    assert names_of(("/a/x", "english/web"), "/b/x") == ("english/web", "x")


def test_equal_ends_get_as_many_folders_as_distinguish_them() -> None:
    assert names_of("/a/en/val.jsonl", "/a/de/val.jsonl") == (
        "en/val.jsonl",
        "de/val.jsonl",
    )
    assert names_of("s3://b/de/v", "s3://c/de/v", "/x/en/v") == (
        "b/de/v",
        "c/de/v",
        "en/v",
    )
    assert names_of("/a/x", ("/b/y", "x")) == ("a/x", "x")


def test_equal_paths_are_numbered_around_given_names() -> None:
    assert names_of("x", "x", "x-2") == ("x", "x-2", "x-2-2")
    assert names_of("x", ("y", "x")) == ("x-2", "x")


@pytest.mark.parametrize("name", ["", "a,b", "a b", "/a", "a/", "a//b", "x" * 201])
def test_names_are_words_that_metrics_can_be_asked_for_by(name: str) -> None:
    with pytest.raises(ValidationError):
        DataSource(path="x", name=name)


def test_two_sources_of_a_list_have_two_names() -> None:
    twice = [{"path": "a", "name": "same"}, {"path": "b", "name": "same"}]
    for split in ("train", "validation"):
        sources = {"train": [{"path": "c", "name": "same"}], split: twice}
        with pytest.raises(ValidationError, match="2 sources have the name 'same'"):
            DataConfig.model_validate(sources)
    DataConfig.model_validate({"train": twice[:1], "validation": twice[1:]})
