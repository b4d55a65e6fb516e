"""From a committed checkpoint of ours to a Hugging Face folder.

Owns: config.json, shards, their index, the tokenizer beside them.

Written tensor by tensor, and the folder appears whole or not at all. Must not know:
training, ranks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.contents import logical_shapes
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.table import FAMILIES, family_of
from megatron_ray.checkpoint.hf.files import CONFIG, SHARDS, SINGLE
from megatron_ray.checkpoint.hf.files import TOKENIZER as HF_TOKENIZER
from megatron_ray.checkpoint.hf.folders import new_folder
from megatron_ray.checkpoint.hf.places import Place, find_places
from megatron_ray.checkpoint.hf.weights import DTYPES
from megatron_ray.checkpoint.load import SavedCheckpoint, bytes_of
from megatron_ray.checkpoint.train_state import TOKENIZER, read_train_state, saved_model
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState, whole_tensor
from megatron_ray.storage.errors import MissingFileError
from megatron_ray.storage.storage import open_storage

DEFAULT_SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CONFIG_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_HEADER_STEP = 8


@dataclass(frozen=True)
class Output:
    """One tensor to be written, and the logical tensors that it is made of."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Place], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: str
    model_type: str
    architecture: str
    tensors: int
    bytes: int
    files: tuple[str, ...]
    tokenizer: bool
    """Whether the checkpoint's tokenizer lies beside."""


def export_folder(
    checkpoint: str,
    out: str,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Exported:
    """Writes the folder `out`; weights keep the type that the checkpoint has them in
    unless `dtype` is given.

    Raises CheckpointError when the checkpoint may not be loaded or `out` is there,
    ConfigError when no known family is the model.
    """
    train_state = read_train_state(checkpoint, 0)
    model = saved_model(checkpoint, train_state)
    family = _family(model, train_state.get("family"))
    saved = SavedCheckpoint(checkpoint)
    outputs = _outputs(saved, family, model, dtype)
    with new_folder(out) as folder:
        files = _write_shards(folder, saved, outputs, shard_bytes)
        tokenizer = _write_tokenizer(folder, checkpoint, train_state)
        config = _config(family, model, train_state, outputs)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    num_bytes = sum(output.num_bytes for output in outputs)
    return Exported(
        out,
        family.model_type,
        family.architecture,
        len(outputs),
        num_bytes,
        files,
        tokenizer,
    )


def _family(model: ModelConfig, imported_as: str | None) -> Family:
    """That which the weights came from where they did; otherwise the nearest."""
    return FAMILIES[imported_as] if imported_as in FAMILIES else family_of(model)


def _outputs(
    saved: SavedCheckpoint, family: Family, model: ModelConfig, dtype: torch.dtype | None
) -> list[Output]:
    shapes = logical_shapes(model)
    parts: dict[str, list[tuple[str, Place]]] = {}
    for name, place in find_places(family.rules(model), shapes).items():
        if place is None:
            raise ConfigError(
                f"{name!r} has no place in a {family.model_type} model, so the checkpoint "
                "cannot be exported"
            )
        if f"model/{name}" not in saved.tensors:
            raise CheckpointError("read", saved.path, f"it has no tensor {name!r}")
        parts.setdefault(place.name, []).append((name, place))
    outputs = {}
    for stored, made_of in parts.items():
        name, place = made_of[0]
        kept = saved.tensors[f"model/{name}"].slots[0].dtype
        # The bias of a choice among experts is small beside its scores: it is fp32
        # wherever it is published.
        chosen = kept if dtype is None or name.endswith("expert_bias") else dtype
        outputs[stored] = Output(
            stored, chosen, place.stored_shape(shapes[name]), tuple(made_of)
        )
    copies = [
        Output(
            name, outputs[original].dtype, outputs[original].shape, outputs[original].parts
        )
        for name, original in family.copies(model).items()
    ]
    return [*outputs.values(), *copies]


def _write_shards(
    folder: Path, saved: SavedCheckpoint, outputs: Sequence[Output], shard_bytes: int
) -> tuple[str, ...]:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.num_bytes
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    names = [SINGLE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, saved, shard)
    if len(shards) > 1:
        where = {
            output.name: name
            for name, shard in zip(names, shards, strict=True)
            for output in shard
        }
        total = sum(output.num_bytes for output in outputs)
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(where.items())),
        }
        (folder / SHARDS).write_text(json.dumps(index, indent=2) + "\n")
    return tuple(names)


def _write_shard(path: Path, saved: SavedCheckpoint, shard: Sequence[Output]) -> None:
    """One file; the header comes first and needs sizes only."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in shard:
        start = end
        end = end + output.num_bytes
        header[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": output.shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _HEADER_STEP)
    with open(path, "wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for output in shard:
            view = bytes_of(_assemble(saved, output))
            while view:  # the kernel cuts writes at 2 GiB
                view = view[file.write(view) :]


def _assemble(saved: SavedCheckpoint, output: Output) -> Tensor:
    """A stored tensor from its logical parts, each read straight into its place."""
    whole = torch.empty(output.shape, dtype=output.dtype)
    for name, place in output.parts:
        shape = saved.tensors[f"model/{name}"].shape
        rows = whole.t() if place.transposed else whole
        part = rows.narrow(0, place.part * shape[0], shape[0])
        if place.rotary is None:
            saved.load_into(_one(name, part))
            continue
        own = torch.empty(shape, dtype=output.dtype)
        saved.load_into(_one(name, own))
        for here, there in Place("", rotary=place.rotary).pieces(
            shape, Box((0,) * len(shape), shape)
        ):
            part.narrow(0, there.offset[0], there.size[0]).copy_(
                own.narrow(0, here.offset[0], here.size[0])
            )
    return whole


def _one(name: str, tensor: Tensor) -> ShardedState:
    return {f"model/{name}": whole_tensor(tensor)}


def _config(
    family: Family,
    model: ModelConfig,
    train_state: Mapping[str, Any],
    outputs: Sequence[Output],
) -> dict[str, Any]:
    end = train_state.get("end_of_document")
    ids = train_state.get("token_ids") or {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
    }
    dtype = _CONFIG_NAMES.get(outputs[0].dtype, "float32")
    own = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
    }
    return own | family.write(model) | dict(ids)


def _write_tokenizer(folder: Path, checkpoint: str, train_state: Mapping[str, Any]) -> bool:
    """The checkpoint's tokenizer, and the little that transformers wants to know
    besides.
    """
    try:
        text = open_storage(checkpoint).read_bytes(TOKENIZER)
    except MissingFileError:
        return False
    (folder / HF_TOKENIZER).write_bytes(text)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ends = [
        token["content"]
        for token in json.loads(text).get("added_tokens", [])
        if token["id"] == train_state.get("end_of_document")
    ]
    if ends:
        settings["eos_token"] = ends[0]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return True
