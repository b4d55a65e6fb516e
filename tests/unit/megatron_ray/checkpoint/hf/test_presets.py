"""What every shipped preset trains is exported and read by transformers, shrunk."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.checkpoint.hf.exporting import export_folder
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.presets.presets import PRESETS
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.training.session import TrainingSession

SEQUENCE = 16
LOGITS_BAR = 1e-5
"""Relative L2, fp32."""


def shrunk(preset: str) -> dict[str, Any]:
    """The preset with small sizes, and everything else as it is."""
    full = ModelConfig.model_validate({"preset": preset})
    fields = full.model_dump(mode="json", exclude={"preset"}) | {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 4 if full.kv_heads == full.num_attention_heads else 2,
        "head_dim": None if full.mla is not None else 8,
        "ffn_hidden_size": 48,
        "vocab_size": 257,
        "max_sequence_length": 64,
    }
    # Gemma's scale depends on the width; windows shorter than the text have an effect.
    if full.embedding_scale != 1:
        fields["embedding_scale"] = 32**0.5
    if full.sliding_window is not None:
        fields["sliding_window"] = 8
    # Weights away from zero, so that the norms' eps does not decide alone.
    fields["init_std"] = 0.1
    if full.mla is not None:
        sizes = dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8)
        sizes |= {"qk_rope_head_dim": 8}
        fields["mla"] |= sizes | {"q_lora_rank": 16 if full.mla.q_lora_rank else None}
    if full.moe is not None:
        fields["moe"] |= {
            "num_experts": 16,
            "ffn_hidden_size": 16,
            "aux_loss_coeff": 0.01,
        }
        has_pattern = full.moe.shared_expert_ffn_hidden_size is not None
        if has_pattern:
            fields["moe"] |= {
                "layer_pattern": [0, 1],
                "shared_expert_ffn_hidden_size": 32,
            }
    return fields


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus.txt").write_text("to be or not to be, that is the question\n" * 20)
    config = config_of({"preset": "gpt-tiny"}, folder)
    return prepare(config.data, str(folder / "cache"), seq_length=SEQUENCE)


def config_of(model: dict[str, Any], folder: Path) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": model,
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(folder / "cache"),
            },
            "training": {
                "seq_length": SEQUENCE,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "steps": 1,
            },
            "optimizer": {"lr": 1e-3},
            "storage": {"path": str(folder / "run")},
        }
    )


@pytest.fixture(scope="module")
def distance(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The distance of logits of a model that was trained, from transformers'."""

    # Presets of one family are often the same once they are small.
    @cache
    def of_model(model: str) -> float:
        folder = tmp_path_factory.mktemp("preset")
        session = TrainingSession(
            config_of(json.loads(model), folder), ParallelMesh.single(), data
        )
        session.run()
        (checkpoint,) = list_checkpoints(str(folder / "run"))
        commit(checkpoint.path, {}, [])
        export_folder(checkpoint.path, str(folder / "out"))
        judge = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "out", experts_implementation="eager"
        )
        tokens = torch.arange(2 * SEQUENCE).view(2, SEQUENCE) * 7 % 257
        positions = torch.arange(SEQUENCE).expand(2, -1)
        with torch.no_grad():
            expected = judge.eval()(tokens).logits
            measured = session.model.module.eval().logits(tokens, positions)
        measured = measured.reshape(2, SEQUENCE, -1)[..., :257]
        return float((measured - expected).norm() / expected.norm())

    return lambda preset: of_model(json.dumps(shrunk(preset), sort_keys=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_trains_is_read_by_transformers(preset: str, distance: Any) -> None:
    assert distance(preset) <= LOGITS_BAR
