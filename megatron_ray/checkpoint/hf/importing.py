"""Writes a folder in Hugging Face format as a committed checkpoint of this library.

Owns: the contents of such a checkpoint: weights without optimizer state or layout, and
a job spec that starts from them.

Tensors are converted one by one. Must not know: training, ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ray.checkpoint.directory import FORMAT_VERSION, INDEX, CheckpointError, commit
from megatron_ray.checkpoint.hf.output_folder import new_folder
from megatron_ray.checkpoint.hf.published.files import inside_checkpoint, read_published
from megatron_ray.checkpoint.hf.published.tokenizer import read_published_tokenizer
from megatron_ray.checkpoint.hf.weights import HfWeights, load_whole
from megatron_ray.checkpoint.index import BoxSpec, RankPlan, data_file, plan_all
from megatron_ray.checkpoint.integrity.digests import DigestedFiles
from megatron_ray.checkpoint.load import bytes_of
from megatron_ray.checkpoint.train_state import TOKENIZER, TRAIN_STATE
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.boxes import Box
from megatron_ray.storage.storage import Writable, open_storage

SPEC = "spec.yaml"
_MAX_SEQ_LENGTH = 4096
"""Maximum sequence length in the spec, which users may change."""


@dataclass(frozen=True)
class Imported:
    """The checkpoint that was written."""

    path: str
    model_type: str
    tensors: int
    bytes: int
    spec: str
    """Path of a job spec that starts from these weights."""
    notes: tuple[str, ...]
    """What a user may not expect of the folder, in sentences."""


def import_folder(source: str, out: str) -> Imported:
    """Writes the checkpoint folder `out`.

    Peak memory is the size of the largest tensor plus scratch memory.

    Raises CheckpointError for damaged files and when `out` exists, ConfigError when the
    model is not supported.
    """
    weights = HfWeights(source)
    # Files may contain weights twice, the checkpoint contains them once, so both must be
    # equal.
    weights.check_copies()
    tokenizer = read_published_tokenizer(weights.storage, source)
    with new_folder(out) as folder:
        storage = DigestedFiles(open_storage(str(folder)))
        num_bytes = _write_tensors(weights, storage)
        # The folder is renamed at the end, so paths in its files start with `out`.
        final = str(Path(out).absolute())
        if tokenizer.content is not None:
            storage.write_bytes_atomic(TOKENIZER, tokenizer.content.encode())
        for name, content in inside_checkpoint(read_published(source)).items():
            storage.write_bytes_atomic(name, content)
        config = _train_config(weights.model, tokenizer, final)
        train_state = json.dumps(_train_state(config, tokenizer))
        storage.write_bytes_atomic(TRAIN_STATE, train_state.encode())
        storage.write_bytes_atomic(SPEC, _spec(config, final).encode())
        storage.write_digests(0)
        # The marker is written last, so that a committed checkpoint is complete.
        commit(str(folder), {"imported_from": source}, [])
    return Imported(
        path=out,
        model_type=weights.family.model_type,
        tensors=len(weights.shapes),
        bytes=num_bytes,
        spec=f"{out}/{SPEC}",
        notes=(*weights.notes, *_tokenizer_notes(weights.model, tokenizer)),
    )


def _tokenizer_notes(model: ModelConfig, tokenizer: ModelTokenizer) -> tuple[str, ...]:
    if tokenizer.content is None:
        return (
            f"the folder has no {TOKENIZER}, without which its weights cannot be trained on "
            f"text; {tokenizer.remedy}",
        )
    notes = (
        tokenizer.rows_note(model.vocabulary),
        tokenizer.end_note,
        tokenizer.begin_note,
    )
    return tuple(note for note in notes if note is not None)


def _write_tensors(weights: HfWeights, storage: DigestedFiles) -> int:
    """Writes all tensors as those of a single rank; returns their bytes."""
    tensors = []
    for name, shape in weights.shapes.items():
        box = Box((0,) * len(shape), shape)
        tensors.append(BoxSpec(f"model/{name}", shape, box, weights.dtype(name)))
    # The plan of a training run with one rank, so that the index has the same form.
    plan = plan_all([tensors])[0]
    if not isinstance(plan, RankPlan) or plan.index is None:
        raise CheckpointError("write", weights.storage.uri(), plan)
    with storage.open_output(data_file(0)) as file:
        _write_slots(weights, plan, file)
    storage.write_bytes_atomic(INDEX, plan.index)
    return plan.num_bytes


def _write_slots(weights: HfWeights, plan: RankPlan, file: Writable) -> None:
    written = 0
    for slot in plan.slots:
        # Slots are aligned; the gaps between them are zeros.
        file.write(b"\0" * (slot.start - written))
        file.write(bytes_of(load_whole(weights, slot.fqn.removeprefix("model/"))))
        written = slot.start + slot.num_bytes


def _train_config(model: ModelConfig, tokenizer: ModelTokenizer, out: str) -> TrainConfig:
    """Returns a run of this model, with placeholders for fields that users must choose."""
    data: dict[str, Any] = {"train": [{"path": "builtin://python-stdlib"}]}
    if tokenizer.content is not None:
        data["tokenizer"] = {
            "kind": "file",
            "path": f"{out}/{TOKENIZER}",
            "end_of_document": tokenizer.end_of_document,
            "begin_of_document": tokenizer.begin_of_document,
        }
    return TrainConfig.from_mapping(
        {
            "model": model.model_dump(mode="json", exclude_defaults=True),
            "data": data,
            "training": {
                "seq_length": min(model.max_sequence_length, _MAX_SEQ_LENGTH),
                "micro_batch_size": 1,
                "global_batch_size": 16,
                "steps": 1000,
            },
            "optimizer": {"lr": 1e-5},
        }
    )


def _train_state(config: TrainConfig, tokenizer: ModelTokenizer) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "consumed_samples": 0,
        "config": config.model_dump(mode="json"),
        "end_of_document": tokenizer.id_of(tokenizer.end_of_document),
        "begin_of_document": tokenizer.id_of(tokenizer.begin_of_document),
        "tokenizer_file": tokenizer.other_form,
    }


def _spec(config: TrainConfig, path: str) -> str:
    # Null is a value where it is not the default, such as of mla.q_lora_rank.
    fields = config.model_dump(mode="json", exclude_defaults=True)
    fields = {"name": "from-pretrained", **fields, "checkpoint": {"start_from": path}}
    data = "data"
    if config.data.tokenizer.path is None:
        data = "data, their tokenizer"
    return (
        f"# A run that starts from these weights. Choose {data}, sequence length, batch, steps "
        f"and learning rate.\n{yaml.safe_dump(fields, sort_keys=False)}"
    )
