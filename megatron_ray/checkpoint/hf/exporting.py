"""Writes a committed checkpoint of this library as a folder in Hugging Face format.

Owns: safetensors files and their index; `published` has the files beside them.

Tensors are written one by one, and the folder appears complete or not at all. Must not
know: training, ranks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.registry import family_for, find_family
from megatron_ray.checkpoint.hf.files import CONFIG, SHARDS, SINGLE
from megatron_ray.checkpoint.hf.files import TOKENIZER as HF_TOKENIZER
from megatron_ray.checkpoint.hf.folder import logical_shapes
from megatron_ray.checkpoint.hf.output_folder import new_folder
from megatron_ray.checkpoint.hf.published.beside_weights import files_beside_weights
from megatron_ray.checkpoint.hf.published.config import config_values
from megatron_ray.checkpoint.hf.published.files import (
    PublishedFiles,
    parsed,
    read_published,
)
from megatron_ray.checkpoint.hf.tensor_locations import TensorLocation, find_locations
from megatron_ray.checkpoint.hf.weights import DTYPES
from megatron_ray.checkpoint.load import SavedCheckpoint, bytes_of
from megatron_ray.checkpoint.train_state import (
    read_tokenizer,
    read_train_state,
    saved_model,
)
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.model_tokenizer import with_begin
from megatron_ray.config.problem import ConfigError
from megatron_ray.sharding.sharded_state import ShardedState, whole_tensor

DEFAULT_SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Names of types in safetensors."""
_CONFIG_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
"""Names of types in config.json."""
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Output:
    """One tensor to write, with the logical tensors that form it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[str, TensorLocation], ...]
    """Logical names with their locations in this tensor."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Exported:
    """The folder that was written."""

    path: str
    model_type: str
    architecture: str
    tensors: int
    bytes: int
    files: tuple[str, ...]
    tokenizer: bool
    """Whether the checkpoint's tokenizer was written too."""
    notes: tuple[str, ...]
    """What a user may not expect of the folder, in sentences."""


def export_folder(
    checkpoint: str,
    out: str,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Exported:
    """Writes the folder `out`.

    Weights keep their type in the checkpoint unless `dtype` is given. Files have at
    most `shard_bytes` bytes, unless a single tensor is larger.

    Raises CheckpointError when the checkpoint cannot be loaded or `out` exists,
    ConfigError when the model belongs to no known family.
    """
    train_state = read_train_state(checkpoint, 0)
    model = saved_model(checkpoint, train_state)
    published = read_published(checkpoint)
    family = _family(model, published)
    saved = SavedCheckpoint(checkpoint)
    # All errors are raised before a folder is created.
    outputs = _outputs(saved, family, model, dtype)
    beside = files_beside_weights(
        published,
        _tokenizer_of(checkpoint, train_state),
        train_state.get("end_of_document"),
        train_state.get("begin_of_document"),
    )
    values = _config_values(model, family, published, outputs[0].dtype)
    values.update(beside.token_ids)
    notes = beside.notes
    if dtype is None:
        notes += _type_notes(published, outputs[0].dtype)
    with new_folder(out) as folder:
        files = _write_shards(folder, saved, outputs, shard_bytes)
        _write_files(folder, beside.files)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    return Exported(
        path=out,
        model_type=family.model_type,
        architecture=family.architecture,
        tensors=len(outputs),
        bytes=sum(output.num_bytes for output in outputs),
        files=files,
        tokenizer=HF_TOKENIZER in beside.files,
        notes=notes,
    )


def _type_notes(published: PublishedFiles, dtype: torch.dtype) -> tuple[str, ...]:
    """Returns a note when the weights have a wider type than the published ones."""
    config = parsed(published, CONFIG)
    name = config.get("dtype") or config.get("torch_dtype")
    if dtype != torch.float32 or name not in ("bfloat16", "float16"):
        return ()
    return (
        f"the weights are float32, as they were trained, and were published as {name}: "
        "--dtype bf16 writes half as many bytes",
    )


def _config_values(
    model: ModelConfig, family: Family, published: PublishedFiles, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the values of config.json, without the ids of tokens."""
    config = parsed(published, CONFIG)
    # A model that has become one of another family has nothing in common with it.
    if config and find_family(config, CONFIG) is not family:
        config = {}
    name = _CONFIG_NAMES.get(dtype, "float32")
    return config_values(family, model, config, dtype=name)


def _family(model: ModelConfig, published: PublishedFiles) -> Family:
    """Returns the family of the published weights, or else the nearest family."""
    config = parsed(published, CONFIG)
    if not config:
        return family_for(model)
    return family_for(model, find_family(config, CONFIG))


def _outputs(
    saved: SavedCheckpoint, family: Family, model: ModelConfig, dtype: torch.dtype | None
) -> list[Output]:
    """Returns the tensors to write, in forward order and copies last."""
    shapes = logical_shapes(model)
    # Several logical tensors can be parts of one stored tensor, such as GPT-2's fused
    # queries, keys and values.
    parts: dict[str, list[tuple[str, TensorLocation]]] = {}
    for name, location in find_locations(family.rules(model), shapes).items():
        if location is None:
            raise ConfigError(
                f"{name!r} has no counterpart in a {family.model_type} model, so the "
                "checkpoint cannot be exported"
            )
        if f"model/{name}" not in saved.tensors:
            raise CheckpointError("read", saved.path, f"it has no tensor {name!r}")
        parts.setdefault(location.name, []).append((name, location))
    outputs = dict[str, Output]()
    for stored_name, members in parts.items():
        name, location = members[0]
        shape = location.stored_shape(shapes[name])
        saved_dtype = saved.tensors[f"model/{name}"].slots[0].dtype
        output = Output(stored_name, saved_dtype, shape, tuple(members))
        # Biases of expert routing are small compared with the scores that they are added
        # to, so they stay in fp32, as in every published model.
        if dtype is not None and not name.endswith("expert_bias"):
            output = replace(output, dtype=dtype)
        outputs[stored_name] = output
    copies = []
    for name, original in family.copies(model).items():
        copies.append(replace(outputs[original], name=name))
    return [*outputs.values(), *copies]


def _write_shards(
    folder: Path, saved: SavedCheckpoint, outputs: Sequence[Output], shard_bytes: int
) -> tuple[str, ...]:
    """Writes the safetensors files, and their index if there are several."""
    # File names contain the number of files, so tensors are assigned to files before
    # writing.
    shards = _shards(outputs, shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / SINGLE, saved, shards[0])
        return (SINGLE,)
    files = []
    total = 0
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, saved, shard)
        files.append(file)
        for output in shard:
            weight_map[output.name] = file
            total += output.num_bytes
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / SHARDS).write_text(json.dumps(index, indent=2) + "\n")
    return tuple(files)


def _shards(outputs: Sequence[Output], shard_bytes: int) -> list[list[Output]]:
    """Distributes tensors over files in order; a larger tensor gets its own file."""
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.num_bytes
    return shards


def _write_shard(path: Path, saved: SavedCheckpoint, shard: Sequence[Output]) -> None:
    """Writes one safetensors file."""
    # The header needs sizes only, so a single tensor at a time is in memory.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in shard:
        start = end
        end = start + output.num_bytes
        header[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": output.shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _HEADER_ALIGNMENT)
    with open(path, "wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for output in shard:
            view = bytes_of(_assemble(saved, output))
            while view:  # Linux writes 2 GiB at most per call
                view = view[file.write(view) :]


def _assemble(saved: SavedCheckpoint, output: Output) -> Tensor:
    """Returns a tensor to write; its logical parts are read into it directly."""
    whole = torch.empty(output.shape, dtype=output.dtype)
    for name, location in output.parts:
        shape = saved.tensors[f"model/{name}"].shape
        # Transposed, so that the first dimension is the logical rows.
        rows = whole
        if location.transposed:
            rows = whole.t()
        part = rows.narrow(0, location.part * shape[0], shape[0])
        if location.rotary is None:
            saved.load_into(_state(name, part))
            continue
        # Rows in another order are read first and then copied, run by run.
        logical = torch.empty(shape, dtype=output.dtype)
        saved.load_into(_state(name, logical))
        for logical_row, stored_row, count in location.rotary.runs(0, shape[0]):
            source = logical.narrow(0, logical_row, count)
            part.narrow(0, stored_row, count).copy_(source)
    return whole


def _state(name: str, tensor: Tensor) -> ShardedState:
    return {f"model/{name}": whole_tensor(tensor)}


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _tokenizer_of(checkpoint: str, train_state: Mapping[str, Any]) -> bytes | None:
    """Returns the tokenizer.json that the run used, if it trained on text.

    It puts the token before every text that began every document of the run.
    """
    content = read_tokenizer(checkpoint)
    if content is None:
        return None
    # Earlier versions of this code did not know of such a token.
    if "begin_of_document" in train_state:
        content = with_begin(content, train_state["begin_of_document"])
    return content.encode()
