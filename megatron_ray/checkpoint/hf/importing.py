"""From a Hugging Face folder to a committed checkpoint of ours, tensor by tensor.

Owns: what such a checkpoint contains.

It has weights only, no layout, and beside them a job spec that begins with it. Must not
know: training, ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ray.checkpoint.directory import FORMAT_VERSION, INDEX, CheckpointError, commit
from megatron_ray.checkpoint.hf.files import TOKENIZER as HF_TOKENIZER
from megatron_ray.checkpoint.hf.folders import new_folder
from megatron_ray.checkpoint.hf.weights import HfWeights, load_whole
from megatron_ray.checkpoint.index import BoxSpec, RankPlan, data_file, plan_all
from megatron_ray.checkpoint.load import bytes_of
from megatron_ray.checkpoint.train_state import TOKENIZER, TRAIN_STATE
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.boxes import Box
from megatron_ray.storage.storage import Storage, Writable, open_storage

SPEC = "spec.yaml"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LONGEST = 4096
"""Tokens of a sequence in the spec that is written; people choose their own."""


@dataclass(frozen=True)
class Imported:
    """What was written."""

    path: str
    model_type: str
    tensors: int
    bytes: int
    spec: str
    """Job spec that begins with these weights."""


def import_folder(source: str, out: str) -> Imported:
    """Writes the checkpoint folder `out`.

    Peak memory is the largest tensor and some scratch.

    Raises CheckpointError for damaged files and when `out` is there, ConfigError when
    the model is not one that can be read.
    """
    weights = HfWeights(source)
    weights.check_copies()
    with new_folder(out) as folder:
        storage = open_storage(str(folder))
        num_bytes = _write_tensors(weights, storage)
        tokenizer = weights.storage.exists(HF_TOKENIZER)
        if tokenizer:
            storage.write_bytes_atomic(TOKENIZER, weights.storage.read_bytes(HF_TOKENIZER))
        final = str(Path(out).absolute())
        config = _settings(weights.model, f"{final}/{TOKENIZER}" if tokenizer else None)
        storage.write_bytes_atomic(
            TRAIN_STATE, json.dumps(_train_state(weights, config)).encode()
        )
        storage.write_bytes_atomic(SPEC, _spec(config, final).encode())
        commit(str(folder), {"imported_from": source}, [])
    return Imported(
        out, weights.family.model_type, len(weights.shapes), num_bytes, f"{out}/{SPEC}"
    )


def _write_tensors(weights: HfWeights, storage: Storage) -> int:
    held = [
        BoxSpec(f"model/{name}", shape, Box((0,) * len(shape), shape), weights.dtype(name))
        for name, shape in weights.shapes.items()
    ]
    plan = plan_all([held])[0]
    if not isinstance(plan, RankPlan) or plan.index is None:
        raise CheckpointError("write", storage.uri(), plan)
    with storage.open_output(data_file(0)) as file:
        _write_slots(weights, plan, file)
    storage.write_bytes_atomic(INDEX, plan.index)
    return plan.num_bytes


def _write_slots(weights: HfWeights, plan: RankPlan, file: Writable) -> None:
    written = 0
    for slot in plan.slots:
        file.write(b"\0" * (slot.start - written))
        file.write(bytes_of(load_whole(weights, slot.fqn.removeprefix("model/"))))
        written = slot.start + slot.num_bytes


def _settings(model: ModelConfig, tokenizer: str | None) -> TrainConfig:
    """A run of this model, with placeholders for what only its user knows."""
    shown = model.model_dump(mode="json", exclude_defaults=True)
    return TrainConfig.from_mapping(
        {
            "model": shown,
            "data": {
                "train": [{"path": "builtin://python-stdlib"}],
                **(
                    {"tokenizer": {"kind": "file", "path": tokenizer}}
                    if tokenizer is not None
                    else {}
                ),
            },
            "training": {
                "seq_length": min(model.max_sequence_length, _LONGEST),
                "micro_batch_size": 1,
                "global_batch_size": 16,
                "steps": 1000,
            },
            "optimizer": {"lr": 1e-5},
        }
    )


def _train_state(weights: HfWeights, config: TrainConfig) -> dict[str, Any]:
    ids = {name: weights.config.get(name) for name in TOKEN_IDS}
    ends = ids["eos_token_id"]
    return {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "consumed_samples": 0,
        "config": config.model_dump(mode="json"),
        "end_of_document": ends[0] if isinstance(ends, list) and ends else ends,
        "family": weights.family.model_type,
        "token_ids": ids,
    }


def _spec(config: TrainConfig, path: str) -> str:
    fields = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    fields = {"name": "from-pretrained", **fields, "checkpoint": {"start_from": path}}
    text = yaml.safe_dump(fields, sort_keys=False)
    return (
        "# A run that begins with these weights. Choose data, sequence length, batch, steps "
        f"and learning rate.\n{text}"
    )
