"""Problems of the weights that a job starts from, found before it holds resources."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.data.preparation.errors import UnusableDataError
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
