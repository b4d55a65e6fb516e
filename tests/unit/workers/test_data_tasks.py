"""Problems of the weights that a job starts from, found before it holds resources."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.checkpoint.directory import commit
from megatron_ray.checkpoint.hf.folder import HfFolder
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.errors import UnusableDataError
from tests.support.hf_folders import publish
from tests.support.tokenizer_files import byte_tokenizer
from workers.agent.check_tasks import check_task
from workers.data_tasks import prepare_data
from workers.protocol.job import JobSpec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


def write_folder(folder: Path, *, vocab_size: int = 300) -> None:
    """A published model of zeros, written by hand: these tasks know no torch."""
    shapes = {"model.embed_tokens": [vocab_size, 8], "model.norm": [8]}
    layer = {f"self_attn.{name}_proj": [8, 8] for name in "qkvo"} | {
        "mlp.gate_proj": [16, 8],
        "mlp.up_proj": [16, 8],
    }
    layer |= {
        "mlp.down_proj": [8, 16],
        "input_layernorm": [8],
        "post_attention_layernorm": [8],
    }
    header = {}
    end = 0
    for name, shape in (
        shapes | {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    ).items():
        start = end
        end = start + 2 * math.prod(shape)
        header[f"{name}.weight"] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(
        len(raw).to_bytes(8, "little") + raw + bytes(end)
    )
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocab_size}))


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "corpus.txt").write_text("some words " * 1000)
    write_folder(tmp_path / "hf")
    return {
        "model": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "ffn_hidden_size": 16,
            "tie_embeddings": True,
            "norm_eps": 1e-6,
        },
        "data": {
            "train": [{"path": str(tmp_path / "corpus.txt")}],
            "tokenizer": {"kind": "bytes"},
        },
        "training": {"seq_length": 16, "global_batch_size": 2, "steps": 1},
        "optimizer": {"lr": 0.001},
        "checkpoint": {"start_from": str(tmp_path / "hf")},
        "storage": {"path": str(tmp_path / "storage")},
    }


def test_weights_that_fit_are_no_problem(spec: dict[str, Any]) -> None:
    assert check_task(spec, spec["storage"]["path"])["problems"] == []
    assert prepare_data(JobSpec.from_mapping(spec)).vocab_size == 257


def test_weights_of_another_model_are_found_before_the_data_are_prepared(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    spec["model"]["ffn_hidden_size"] = 32
    (problem,) = check_task(spec, spec["storage"]["path"])["problems"]
    assert (problem["pointer"], problem["code"]) == (
        "/model/ffn_hidden_size",
        "start_from_model",
    )
    with pytest.raises(
        UnusableDataError,
        match=r"ffn_hidden_size=32 contradicts the weights of checkpoint.start_from, which were "
        r"made with 16",
    ):
        prepare_data(JobSpec.from_mapping(spec))
    assert not (tmp_path / "storage").exists()


def test_weights_that_are_not_there_or_too_few_for_the_tokenizer(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    write_folder(tmp_path / "hf", vocab_size=100)
    with pytest.raises(
        UnusableDataError, match=r"model.vocab_size=100 is smaller than the tokenizer's 257"
    ):
        prepare_data(JobSpec.from_mapping(spec))
    (tmp_path / "hf" / "model.safetensors").unlink()
    (problem,) = check_task(spec, spec["storage"]["path"])["problems"]
    assert problem["pointer"] == "/checkpoint/start_from"
    assert "holds neither model.safetensors nor" in problem["detail"]


def test_the_steps_of_epochs_are_noted_where_the_data_are_prepared(
    spec: dict[str, Any],
) -> None:
    del spec["checkpoint"]
    spec["training"] = {"seq_length": 16, "global_batch_size": 2, "epochs": 2}
    storage = spec["storage"]["path"]
    assert check_task(spec, storage)["notes"] == []
    prepared = prepare_data(JobSpec.from_mapping(spec))
    steps = (2 * prepared.num_train_tokens - 1) // 16 // 2
    note = f"training.epochs=2 makes {steps:,} steps on the prepared data"
    assert check_task(spec, storage)["notes"] == [note]
    spec["training"] |= {"epochs": 1 << 20, "seq_length": 1}
    with pytest.raises(UnusableDataError, match="samples, at most") as caught:
        prepare_data(JobSpec.from_mapping(spec))
    assert caught.value.problems[0].pointer == "/training/epochs"


def test_what_depends_on_the_length_of_the_data_is_noted(spec: dict[str, Any]) -> None:
    del spec["checkpoint"]
    spec["training"] = {"seq_length": 16, "global_batch_size": 1000, "epochs": 2}
    spec["schedule"] = {"warmup_steps": 5}
    notes = prepare_data(JobSpec.from_mapping(spec)).notes
    assert any(
        "warmup_steps=5 is not shorter than training.steps=1:" in note for note in notes
    )
    (note,) = [note for note in notes if "global_batch_size" in note]
    assert "each step has 1000 samples, and the training data make 653 of 16 tokens" in note


def test_layers_of_the_weights_that_a_job_leaves_out_are_noted(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    publish("deepseek_v3-mtp", tmp_path / "hf")
    spec["model"] = HfFolder(str(tmp_path / "hf")).model.model_dump(mode="json")
    assert check_task(spec, spec["storage"]["path"])["notes"] == []
    spec["model"]["mtp"] = None
    note = (
        f"the multi-token prediction layers of {tmp_path}/hf are left out; set model.mtp to "
        "train them too"
    )
    assert check_task(spec, spec["storage"]["path"]) == {"problems": [], "notes": [note]}
    messages: list[str] = []
    assert prepare_data(JobSpec.from_mapping(spec), messages.append).notes[0] == note
    assert note in messages


def submitted(spec: dict[str, Any]) -> list[dict[str, str]]:
    """The problems that a submit answers."""
    problems: list[dict[str, str]] = check_task(spec, spec["storage"]["path"])["problems"]
    return problems


def add_tokenizer(folder: Path, content: str, **config: Any) -> None:
    (folder / "tokenizer.json").write_text(content)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))


def both(spec: dict[str, Any]) -> tuple[str, str]:
    """The pointer of a job's one problem, as submit and the job itself see it."""
    (problem,) = submitted(spec)
    with pytest.raises(UnusableDataError) as caught:
        prepare_data(JobSpec.from_mapping(spec))
    (other,) = caught.value.problems
    assert problem["detail"] == other.detail
    assert not list(Path(spec["storage"]["path"]).glob("data/corpora/*"))
    return other.pointer, other.detail


def test_the_tokenizer_of_published_weights_is_taken_with_the_tokens_around_documents(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    add_tokenizer(
        tmp_path / "hf", byte_tokenizer("<s>", "</s>", begin="<s>"), eos_token_id=257
    )
    spec["data"]["tokenizer"] = {}
    assert submitted(spec) == []
    prepared = prepare_data(JobSpec.from_mapping(spec))
    assert (prepared.begin_of_document, prepared.end_of_document) == (256, 257)
    assert f"{tmp_path / 'corpus.txt'}: 256 '<s>', 115 's', " in prepared.first_document


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_weights_with_an_unread_tokenizer_are_refused_and_the_remedy_leads_to_a_run(
    spec: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"pieces")
    spec["data"]["tokenizer"] = {"kind": kind}
    pointer, detail = both(spec)
    assert pointer == "/data/tokenizer/kind"
    assert "is in tokenizer.model, which is not read" in detail
    # What AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes.
    path = tmp_path / "hf" / "tokenizer.json"
    path.write_text(byte_tokenizer("<|endoftext|>"))
    spec["data"]["tokenizer"] = {"kind": "file", "path": str(path)}
    assert submitted(spec) == []
    assert prepare_data(JobSpec.from_mapping(spec)).vocab_size == 257


def test_another_tokenizer_than_the_weights_is_refused_and_the_remedy_leads_to_a_run(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    add_tokenizer(tmp_path / "hf", byte_tokenizer("<s>", "</s>"), eos_token_id=257)
    (tmp_path / "other.json").write_text(byte_tokenizer("</s>", "<s>"))
    spec["data"]["tokenizer"] = {"kind": "file", "path": str(tmp_path / "other.json")}
    pointer, detail = both(spec)
    assert pointer == "/data/tokenizer/path"
    assert "token '<s>' is 257 instead of 256" in detail
    path = re.search(r"set data.tokenizer to {kind: file, path: (\S+)}", detail)
    assert path is not None
    spec["data"]["tokenizer"]["path"] = path[1]
    assert submitted(spec) == []
    assert prepare_data(JobSpec.from_mapping(spec)).end_of_document == 257
    # The same content at another path is the same tokenizer.
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(json.loads(Path(path[1]).read_text()), indent=2))
    spec["data"]["tokenizer"]["path"] = str(copy)
    assert submitted(spec) == []


def test_a_tokenizer_with_more_tokens_than_rows_is_told_at_once_and_rows_can_be_added(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    write_folder(tmp_path / "hf", vocab_size=257)
    add_tokenizer(tmp_path / "hf", byte_tokenizer("<|endoftext|>", "<pad>"))
    spec["data"]["tokenizer"] = {}
    # A token that never occurs does no harm.
    assert submitted(spec) == []
    prepared = prepare_data(JobSpec.from_mapping(spec))
    assert (prepared.vocab_size, prepared.rows) == (258, 257)
    spec["data"]["tokenizer"] = {"special_tokens_in_text": ["<pad>"]}
    spec["storage"]["path"] = str(tmp_path / "second")
    pointer, detail = both(spec)
    assert pointer == "/model/vocab_size"
    assert detail == (
        "model.vocab_size=257 is smaller than the tokenizer's 258, whose last token is "
        "'<pad>'; set it to 258 or more: rows that the weights lack are added"
    )
    spec["model"]["vocab_size"] = 258
    assert submitted(spec) == []
    assert prepare_data(JobSpec.from_mapping(spec)).rows == 258
    spec["model"]["vocab_size"] = 256
    first, second = submitted(spec)
    assert "model.vocab_size=256 is smaller than the tokenizer's 258" in first["detail"]
    assert "vocab_size=256 contradicts the weights" in second["detail"]


def test_a_job_that_goes_on_keeps_the_tokenizer_of_its_checkpoint(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    content = byte_tokenizer("<s>", "</s>")
    add_tokenizer(tmp_path / "hf", content, eos_token_id=257)
    checkpoint = tmp_path / "storage" / "checkpoints" / "step-00000001-a0001"
    checkpoint.mkdir(parents=True)
    spec["data"]["tokenizer"] = {"vocab_size": 300}
    config = JobSpec.from_mapping(spec).model_dump(mode="json")
    state = {
        "format_version": 1,
        "end_of_document": 256,
        "begin_of_document": 257,
        "config": {name: config[name] for name in TrainConfig.model_fields},
    }
    (checkpoint / "train_state.json").write_text(json.dumps(state))
    (checkpoint / "tokenizer.json").write_text(content)
    (checkpoint / "index.json").write_text('{"files": {}}')
    commit(str(checkpoint), {}, [])
    prepared = prepare_data(JobSpec.from_mapping(spec))
    assert (prepared.begin_of_document, prepared.end_of_document) == (257, 256)
    assert Path(prepared.tokenizer_path).read_text() == content
    assert prepared.notes == ()
    spec["data"]["tokenizer"] = {"kind": "bytes"}
    with pytest.raises(UnusableDataError, match=f"{checkpoint.name}/tokenizer.json"):
        prepare_data(JobSpec.from_mapping(spec))
