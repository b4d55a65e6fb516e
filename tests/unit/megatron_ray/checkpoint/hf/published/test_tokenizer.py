"""A folder's tokenizer and the tokens around a document, judged by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.importing import import_folder
from megatron_ray.checkpoint.initial_tokenizer import initial_tokenizer
from megatron_ray.config.model_tokenizer import with_begin
from megatron_ray.data.tokenizer import Tokenizer
from tests.support.hf_folders import VOCABULARY, edit_config, publish
from tests.support.tokenizer_files import byte_tokenizer

LLAMA = byte_tokenizer("<s>", "</s>", begin="<s>")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish("llama", folder)
    return folder


def add_tokenizer(folder: Path, content: str, settings: dict[str, Any] | None) -> None:
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    if settings is not None:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("begin", "settings"),
    [
        ("<s>", {}),
        (None, {}),
        ("<s>", {"add_bos_token": False, "bos_token": "<s>"}),
        ("<s>", {"add_eos_token": False, "bos_token": "<s>"}),
    ],
    ids=["template", "none", "not added", "only eos"],
)
def test_prompts_are_what_transformers_makes_of_them(
    published: Path, tmp_path: Path, begin: str | None, settings: dict[str, Any]
) -> None:
    add_tokenizer(published, byte_tokenizer("<s>", "</s>", begin=begin), settings)
    edit_config(published, eos_token_id=257)
    out = tmp_path / "ours"
    import_folder(str(published), str(out))
    made = initial_tokenizer(str(out))
    assert made.content is not None
    tokenizer = Tokenizer.from_json(
        made.content, made.end_of_document, made.begin_of_document
    )
    judge = transformers.AutoTokenizer.from_pretrained(published)
    assert tokenizer.encode_prompt("a line") == judge("a line")["input_ids"]


def test_an_import_writes_the_tokens_around_a_document_into_the_spec(
    published: Path, tmp_path: Path
) -> None:
    add_tokenizer(published, LLAMA, None)
    edit_config(published, eos_token_id=[257, 3])
    imported = import_folder(str(published), str(tmp_path / "ours"))
    spec = yaml.safe_load(Path(imported.spec).read_text())
    assert spec["data"]["tokenizer"] == {
        "kind": "file",
        "path": str(tmp_path / "ours" / "tokenizer.json"),
        "end_of_document": "</s>",
        "begin_of_document": "<s>",
    }
    made = initial_tokenizer(str(tmp_path / "ours"))
    assert (made.end_of_document, made.begin_of_document) == (257, 256)
    assert imported.notes == ()
    of_folder = initial_tokenizer(str(published))
    assert (of_folder.end_of_document, of_folder.begin_of_document) == ("</s>", "<s>")


def test_an_import_notes_what_its_runs_will_need(published: Path, tmp_path: Path) -> None:
    more = [f"<more-{number}>" for number in range(VOCABULARY - 255)]
    add_tokenizer(published, byte_tokenizer(*more), None)
    (note,) = import_folder(str(published), str(tmp_path / "larger")).notes
    assert (
        f"tokens up to {VOCABULARY} ('{more[-1]}') and the model {VOCABULARY} rows" in note
    )
    (published / "tokenizer.json").unlink()
    (published / "tokenizer.model").write_bytes(b"pieces")
    imported = import_folder(str(published), str(tmp_path / "none"))
    (note,) = imported.notes
    assert note.startswith("the folder has no tokenizer.json, without which its weights")
    spec = Path(imported.spec).read_text()
    assert "tokenizer" not in yaml.safe_load(spec)["data"]
    assert "Choose data, their tokenizer, sequence length" in spec
    for path in (published, tmp_path / "none"):
        made = initial_tokenizer(str(path))
        assert (made.content, made.other_form) == (None, "tokenizer.model")
    (published / "tokenizer.model").unlink()


@pytest.mark.parametrize("content", ["broken", '{"model": {"vocab": 3}}', "[]"])
def test_a_damaged_tokenizer_is_one_message(published: Path, content: str) -> None:
    add_tokenizer(published, content, None)
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json: it is not a tokenizer.json"
    ):
        initial_tokenizer(str(published))


@pytest.mark.parametrize("of_run", [256, None], ids=["begun", "plain"])
@pytest.mark.parametrize("in_file", ["<s>", None], ids=["template", "none"])
def test_an_exported_tokenizer_begins_texts_as_the_run_did(
    tmp_path: Path, of_run: int | None, in_file: str | None
) -> None:
    content = with_begin(byte_tokenizer("<s>", "</s>", begin=in_file), of_run)
    add_tokenizer(tmp_path, content, {})
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_json(content, "</s>", of_run)
    assert judge("a line")["input_ids"] == ours.encode_prompt("a line")
    assert with_begin(content, of_run) == content
