"""What a model brought along and training does not change comes back in every export."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.checkpoint.hf import importing
from megatron_ray.checkpoint.hf.exporting import export_folder
from megatron_ray.checkpoint.hf.families.registry import FAMILIES, read_model
from megatron_ray.checkpoint.hf.importing import import_folder
from megatron_ray.checkpoint.hf.published.beside_weights import files_beside_weights
from megatron_ray.checkpoint.hf.published.config import config_values
from megatron_ray.checkpoint.hf.published.files import read_published
from megatron_ray.config.model_tokenizer import with_begin
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.training import saving
from megatron_ray.training.session import TrainingSession
from tests.support.hf_folders import SEQUENCE, edit_config, publish
from tests.support.tokenizer_files import byte_tokenizer

TOKEN_IDS = {"bos_token_id": 257, "eos_token_id": [256, 258], "pad_token_id": 259}
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|eot|>",
    "pad_token": "<pad>",
    "model_max_length": 128,
    "added_tokens_decoder": {"258": {"content": "<|eot|>", "special": True}},
}


def tokenizer_json(*special: str) -> str:
    """Of bytes, <|endoftext|> with id 256, and further special tokens."""
    inner = tokenizers.Tokenizer.from_str(Tokenizer.of_bytes().to_json())
    inner.add_special_tokens(list(special))
    # A setting for other programs, which training switches off.
    inner.enable_truncation(128)
    return str(inner.to_str(pretty=True))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A chat model as it is published, with files beside its weights."""
    folder = tmp_path / "hf"
    publish("llama", folder)
    edit_config(folder, **TOKEN_IDS, pretraining_tp=7, task_specific_params={"a": 1})
    (folder / "tokenizer.json").write_text(tokenizer_json("<s>", "<|eot|>", "<pad>"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    generation = {"eos_token_id": [258, 256], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "LICENSE").write_text("free")
    (folder / "license.txt").write_text("free too")
    (folder / "LICENSES").mkdir()
    (folder / "tekken.json").write_text("{}")
    return folder


def assert_behaves_as(folder: Path, published: dict[str, bytes]) -> None:
    exported = read_published(str(folder))
    for name, content in published.items():
        if name == "config.json":
            assert config_of(exported) == config_of(published)
        else:
            assert exported[name] == content, name
    assert exported.keys() == published.keys()


def config_of(files: dict[str, bytes]) -> dict[str, Any]:
    """Without the type of the weights, which has two names."""
    values: dict[str, Any] = json.loads(files["config.json"])
    return {key: value for key, value in values.items() if "dtype" not in key}


def train(
    folder: Path, name: str, start_from: Path, resume_from: str | None = None
) -> list[str]:
    """Trains two steps more and returns the checkpoints of each step."""
    config = TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 48,
                "max_sequence_length": SEQUENCE,
                "norm_eps": 1e-5,
            },
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {
                    "kind": "file",
                    "path": str(folder / "tokenizer.json"),
                    "end_of_document": "<|endoftext|>",
                },
                "cache": str(folder / "cache"),
            },
            "training": {
                "seq_length": 16,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "steps": 2,
            },
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"start_from": str(start_from), "every_steps": 1},
            "storage": {"path": str(folder / name)},
        }
    )
    data = prepare(config.data, str(folder / "cache"), seq_length=16)
    TrainingSession(config, ParallelMesh.single(), data, resume_from=resume_from).run()
    paths = [checkpoint.path for checkpoint in list_checkpoints(str(folder / name))]
    for path in paths:
        commit(path, {}, [])
    return paths


def test_published_files_survive_runs_and_resumes(tmp_path: Path, published: Path) -> None:
    (tmp_path / "corpus.txt").write_text("a line of text\n" * 40)
    (tmp_path / "tokenizer.json").write_text((published / "tokenizer.json").read_text())
    original = read_published(str(published))
    first, _ = train(tmp_path, "run", published)
    # A resumed run no longer needs the folder that it started from.
    published.rename(tmp_path / "gone")
    (resumed,) = train(tmp_path, "resumed", published, first)
    _, last = train(tmp_path, "next", Path(resumed))
    exported = export_folder(last, str(tmp_path / "out"))
    assert exported.notes == ()
    assert_behaves_as(tmp_path / "out", original)


def test_a_checkpoint_of_an_earlier_version_gets_them_when_it_is_resumed(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text("a line of text\n" * 40)
    (tmp_path / "tokenizer.json").write_text((published / "tokenizer.json").read_text())
    with monkeypatch.context() as patched:
        patched.setattr(saving, "read_published", lambda _: {})
        first, _ = train(tmp_path, "run", published)
    (resumed,) = train(tmp_path, "resumed", published, first)
    assert read_published(resumed) == read_published(str(published))


def test_an_import_keeps_published_files(tmp_path: Path, published: Path) -> None:
    import_folder(str(published), str(tmp_path / "ours"))
    export_folder(str(tmp_path / "ours"), str(tmp_path / "out"))
    assert_behaves_as(tmp_path / "out", read_published(str(published)))


def test_an_import_of_an_earlier_version_keeps_its_ids_and_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("mistral", tmp_path / "hf")
    edit_config(tmp_path / "hf", sliding_window=None, **TOKEN_IDS)
    write_state = importing._train_state

    def earlier_state(*arguments: Any) -> dict[str, Any]:
        return write_state(*arguments) | {"family": "mistral", "token_ids": TOKEN_IDS}

    monkeypatch.setattr(importing, "read_published", lambda _: {})
    monkeypatch.setattr(importing, "_train_state", earlier_state)
    import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    exported = export_folder(str(tmp_path / "ours"), str(tmp_path / "out"))
    assert exported.model_type == "mistral"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in TOKEN_IDS} == TOKEN_IDS


FILES = {
    "config.json": json.dumps({"model_type": "llama", **TOKEN_IDS}).encode(),
    "tokenizer_config.json": json.dumps(SETTINGS).encode(),
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"free",
}


def test_a_tokenizer_with_more_tokens_keeps_the_published_settings() -> None:
    original = tokenizer_json("<s>", "<|eot|>", "<pad>").encode()
    larger = tokenizer_json("<s>", "<|eot|>", "<pad>", "<tool>").encode()
    published = FILES | {"tokenizer.json": original}
    beside = files_beside_weights(published, larger, 256)
    assert beside.token_ids == TOKEN_IDS
    assert beside.files["tokenizer.json"] == larger
    assert beside.files["tokenizer_config.json"] == FILES["tokenizer_config.json"]
    assert beside.notes == ()


@pytest.mark.parametrize(
    "reference",
    [
        {"tokenizer.json": tokenizer_json("<s>", "<|eot|>", "<pad>").encode()},
        {"vocab.json": b'{"a": 97}', "added_tokens.json": b'{"<pad>": 259}'},
        {},
    ],
    ids=["tokenizer", "vocabulary", "settings"],
)
def test_another_tokenizer_leaves_published_ids_out_and_says_so(
    reference: dict[str, bytes],
) -> None:
    other = tokenizer_json("<other>").encode()
    beside = files_beside_weights(FILES | reference, other, 256)
    assert beside.token_ids == {
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": None,
    }
    assert beside.files.keys() == {"LICENSE", "tokenizer.json", "tokenizer_config.json"}
    settings = json.loads(beside.files["tokenizer_config.json"])
    assert settings["eos_token"] == "<|endoftext|>"
    assert "bos_token" not in settings
    (note,) = beside.notes
    assert "the run's tokenizer is not the published one" in note
    assert "chat_template.jinja" in note


def test_the_tokenizer_of_a_run_knows_the_tokens_around_its_documents() -> None:
    content = with_begin(byte_tokenizer("<s>", "</s>"), 256).encode()
    beside = files_beside_weights({}, content, 257, 256)
    assert json.loads(beside.files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }


@pytest.mark.parametrize("end", [258, 7])
def test_without_published_ids_the_end_token_decides(end: int) -> None:
    published = {"config.json": FILES["config.json"]}
    beside = files_beside_weights(published, tokenizer_json("<s>", "<end>").encode(), end)
    assert beside.token_ids["eos_token_id"] == ([256, 258] if end == 258 else 7)


@pytest.mark.parametrize("in_tokenizer", [True, False])
def test_the_end_token_of_a_run_is_among_those_of_its_export(in_tokenizer: bool) -> None:
    content = tokenizer_json("<s>", "<|eot|>", "<pad>", "<end>").encode()
    generation = json.dumps({"eos_token_id": [258], "top_p": 0.9}).encode()
    published = FILES | {"tokenizer.json": content, "generation_config.json": generation}
    if in_tokenizer:
        settings = SETTINGS | {"eos_token": "<end>"}
        published["tokenizer_config.json"] = json.dumps(settings).encode()
    beside = files_beside_weights(published, content, 260)
    written = json.loads(beside.files["generation_config.json"])
    if in_tokenizer:
        assert (beside.token_ids, beside.notes) == (TOKEN_IDS, ())
        assert written == {"eos_token_id": [258], "top_p": 0.9}
        return
    assert beside.token_ids == TOKEN_IDS | {"eos_token_id": [256, 258, 260]}
    assert written == {"eos_token_id": [256, 258, 260], "top_p": 0.9}
    (note,) = beside.notes
    assert "ended with token 260, which is no end token of the published model" in note


@pytest.mark.parametrize("of_run", [None, 257])
@pytest.mark.parametrize("of_model", [None, "<s>"])
def test_an_export_begins_texts_as_its_run_did(
    of_run: int | None, of_model: str | None
) -> None:
    content = byte_tokenizer("<eos>", "<s>", begin=of_model)
    own = with_begin(content, of_run).encode()
    published = FILES | {"tokenizer.json": content.encode()}
    beside = files_beside_weights(published, own, 256, of_run)
    inner = tokenizers.Tokenizer.from_str(beside.files["tokenizer.json"].decode())
    assert (inner.encode("a").ids == [257, 97]) == (of_run == 257)
    is_same = (of_run is None) == (of_model is None)
    assert (beside.files["tokenizer.json"] == content.encode()) == is_same


def test_a_run_without_a_tokenizer_keeps_everything() -> None:
    beside = files_beside_weights(FILES, None, None)
    assert beside.files.keys() == FILES.keys() - {"config.json"}
    assert beside.token_ids == TOKEN_IDS


def test_only_changed_values_of_the_config_are_written_anew() -> None:
    values = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "quantization_config": {"quant_method": "fp8"},
        "dtype": "bfloat16",
        "unknown": "kept",
        "eos_token_id": 3,
    }
    llama = FAMILIES["llama"]
    model = read_model(llama, values, "config.json")
    same = config_values(llama, model, values, dtype="float32")
    gone = ("quantization_config", "dtype", "eos_token_id")
    expected = {key: value for key, value in values.items() if key not in gone}
    assert same == expected | {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float32",
    }
    longer = model.model_copy(update={"rope_theta": 5e5, "max_sequence_length": 4096})
    changed = config_values(llama, longer, values, dtype="float32")
    assert "rope_parameters" not in changed
    assert changed["rope_theta"] == 5e5
    assert changed["max_position_embeddings"] == 4096
    assert "num_key_value_heads" not in changed
    assert read_model(llama, changed, "config.json") == longer


def test_a_byte_order_mark_changes_nothing_in_a_folder(
    published: Path, tmp_path: Path
) -> None:
    def exported(name: str) -> dict[str, bytes]:
        import_folder(str(published), str(tmp_path / name))
        export_folder(str(tmp_path / name), str(tmp_path / f"{name}-out"))
        return read_published(str(tmp_path / f"{name}-out"))

    plain = exported("plain")
    for file in (*published.glob("*.json"), published / "chat_template.jinja"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = exported("marked")
    assert marked == plain
