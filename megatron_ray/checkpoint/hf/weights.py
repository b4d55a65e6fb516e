"""The weights of a Hugging Face folder by logical name. Owns: whether folder and family agree, reading boxes, undoing fp8 blocks.

A reader takes only the bytes of its boxes, row by row where it must. Must not know: optimizers, layouts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.table import family_named, read_model
from megatron_ray.checkpoint.hf.files import CONFIG, DTYPES, StoredModel, StoredTensor, open_folder
from megatron_ray.checkpoint.hf.places import Place, find_places
from megatron_ray.checkpoint.load import Read, read_all
from megatron_ray.checkpoint.sharded_state import ShardedState, ShardedTensor, whole_tensor
from megatron_ray.config.model import ModelConfig
from megatron_ray.parameters import Box, logical_parameters
from megatron_ray.rules.problem import ConfigProblem

SCALES = "_scale_inv"
"""Ends the name of the tensor with a factor for each block of an fp8 weight."""
_CHUNK_ELEMENTS = 4 * 1024 * 1024
_SHOWN = 4
_ROUTER, _BIAS = "moe.router.weight", "moe.expert_bias"

_FIELDS = {
    "embedding.weight": "vocab_size or model.hidden_size",
    "head.weight": "vocab_size or model.hidden_size",
    "position_embedding.weight": "max_sequence_length",
    "*.attention.[kv].*": "num_query_groups or model.head_dim",
    "*.attention.kv_*": "mla.kv_lora_rank, its head widths or model.num_attention_heads",
    "*.attention.q_[du]*": "mla.q_lora_rank, its head widths or model.num_attention_heads",
    "*.attention.?_norm.*": "head_dim",
    "*.attention.*": "num_attention_heads or model.head_dim",
    "*.mlp.*": "ffn_hidden_size",
    "*.moe.router.*": "moe.num_experts",
    "*.moe.expert_bias": "moe.num_experts",
    "*.moe.shared.*": "moe.shared_expert_ffn_hidden_size",
    "*.moe.experts.*": "moe.ffn_hidden_size",
}
"""What decides a tensor's shape beside hidden_size; the first pattern that fits."""


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All that a checkpoint has of a model, in forward order: parameters, and balancing biases of experts."""
    found: dict[str, tuple[int, ...]] = {}
    for parameter in logical_parameters(model):
        found[parameter.name] = parameter.shape
        if parameter.name.endswith(_ROUTER) and model.moe is not None and model.moe.expert_bias:
            found[parameter.name.removesuffix(_ROUTER) + _BIAS] = parameter.shape[:1]
    return found


class HfWeights:
    """An opened folder whose names and shapes are those of its config.json.

    Raises CheckpointError for damaged files, ConfigProblem for an unknown family, for options that are not supported and for tensors
    that contradict config.json.
    """

    def __init__(self, path: str) -> None:
        stored = open_folder(path)
        self.path, self.config, self.storage = path, stored.config, stored.storage
        where = stored.storage.uri(CONFIG)
        self.family = family_named(stored.config, where)
        self._block = _fp8_block(stored.config, where)
        self._tensors = _full_names(stored, self.family)
        self.model = self.family.present(read_model(self.family, stored.config, where), self._tensors)
        self.shapes = logical_shapes(self.model)
        self.places = self._find_places()
        self._check_shapes()

    def _find_places(self) -> dict[str, Place]:
        """Raises ConfigProblem when a tensor is missing, or one is there that the model does not have."""
        found = find_places(self.family.rules(self.model), self.shapes)
        places = {name: place for name, place in found.items() if place is not None}
        if len(places) < len(found):
            unknown = [name for name, place in found.items() if place is None]
            raise ConfigProblem(f"{self.path}: {self.family.model_type} has no tensor for {_some(unknown)}")
        needed = {place.name for place in places.values()}
        if missing := sorted(needed - self._tensors.keys()):
            raise ConfigProblem(
                f"{self.path} lacks {len(missing)} of the {len(needed)} tensors that its {CONFIG} asks for: {_some(missing)}"
            )
        known = needed | self.copies.keys() | {name + SCALES for name in needed if self._tensors[name].dtype == "F8_E4M3"}
        if extra := sorted(name for name in self._tensors.keys() - known if not self._ignored(name)):
            text = f"{self.path} holds {len(extra)} tensors that a {self.family.model_type} model of {self.model.num_layers} layers"
            raise ConfigProblem(f"{text}, as its {CONFIG} describes it, does not have: {_some(extra)}")
        return places

    @property
    def copies(self) -> Mapping[str, str]:
        """Stored tensor -> the one that it repeats, where both are there."""
        found = dict(self.family.copies(self.model))
        if self.model.tie_embeddings:
            found["lm_head.weight"] = find_places(self.family.rules(self.model), ["embedding.weight"])["embedding.weight"].name  # type: ignore[union-attr]
        return {name: original for name, original in found.items() if name in self._tensors}

    def _ignored(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.family.ignored) or (
            name.endswith(SCALES) and name.removesuffix(SCALES) in self.copies
        )

    def _check_shapes(self) -> None:
        for name, place in self.places.items():
            stored, expected = self._tensors[place.name], place.stored_shape(self.shapes[name])
            if stored.dtype not in DTYPES:
                raise ConfigProblem(f"{self.path}: tensor {place.name!r} has type {stored.dtype}, which is not supported")
            if stored.shape != expected:
                field = next((text for pattern, text in _FIELDS.items() if fnmatchcase(name, pattern)), "hidden_size")
                text = f"tensor {place.name!r} has shape {list(stored.shape)}, {list(expected)} is expected"
                raise ConfigProblem(f"{self.path}: {text} from {CONFIG}; look at model.{field}")
            if stored.dtype == "F8_E4M3":
                self._check_scales(stored)

    def _check_scales(self, stored: StoredTensor) -> None:
        scales = self._tensors.get(stored.name + SCALES)
        wanted = tuple(-(-size // block) for size, block in zip(stored.shape, self._block, strict=False))
        if scales is None or scales.shape != wanted or len(stored.shape) != 2:
            text = f"fp8 tensor {stored.name!r} of shape {list(stored.shape)} needs a factor for each block of {list(self._block)}"
            there = "there is none" if scales is None else f"{scales.name!r} has shape {list(scales.shape)}"
            raise ConfigProblem(f"{self.path}: {text}, and {there}")

    def dtype(self, name: str) -> torch.dtype:
        """In which a logical tensor is best kept: as stored, or bf16 where that was fp8 with factors (DeepSeek's own conversion)."""
        found = DTYPES[self._tensors[self.places[name].name].dtype]
        return torch.bfloat16 if found.itemsize == 1 else found

    def load_into(self, state: ShardedState) -> None:
        """Fills every `model/...` box of `state`, converting types where they differ. Raises CheckpointError, ConfigProblem."""
        work, scaled = defaultdict[str, list[Read]](list), list[Read]()
        for fqn, wanted in state.items():
            name = fqn.removeprefix("model/")
            if self.shapes.get(name) != wanted.shape:
                text = f"its tensor {name!r} has shape {self.shapes.get(name)}, the model needs {wanted.shape}"
                raise CheckpointError("read", self.path, text)
            stored = self._tensors[self.places[name].name]
            reads = scaled if stored.dtype == "F8_E4M3" else work[stored.file]
            reads += _reads(self.places[name], stored, wanted)
        read_all(self.storage, work)
        for read in scaled:
            self._read_scaled(read)

    def _read_scaled(self, read: Read) -> None:
        """Some rows at a time: values x the factor of their block, in fp32."""
        stored, (first, left), (rows, columns) = self._tensors[read.slot.fqn], read.part.offset, read.part.size
        tall, wide = self._block
        step = max(1, _CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            above, beside = (first + start) // tall, left // wide
            factors = Box((above, beside), (-(-(first + start + count) // tall) - above, -(-(left + columns) // wide) - beside))
            values, scales = torch.empty(count, columns), torch.empty(factors.size)
            read_all(self.storage, {stored.file: [Read(read.slot, Box((first + start, left), (count, columns)), values)]})
            source = self._tensors[stored.name + SCALES]
            read_all(self.storage, {source.file: [Read(source.slot, factors, scales)]})
            by_row = scales[torch.arange(first + start, first + start + count) // tall - above]
            values *= by_row[:, torch.arange(left, left + columns) // wide - beside]
            read.target.narrow(0, start, count).copy_(values)

    def check_copies(self) -> None:
        """Reads what the model has once and the files twice. Raises ConfigProblem where the two differ."""
        for name, original in self.copies.items():
            one, other = self._tensors[name], self._tensors[original]
            if one.shape != other.shape or not all(map(torch.equal, self._blocks(one), self._blocks(other))):
                text = f"{self.path}: tensor {name!r} differs from {original!r}, but the model has them once"
                raise ConfigProblem(f"{text} (config.json: tie_word_embeddings, num_nextn_predict_layers)")

    def _blocks(self, stored: StoredTensor) -> Iterator[Tensor]:
        step = max(1, _CHUNK_ELEMENTS // prod(stored.shape[1:]))
        for start in range(0, stored.shape[0], step):
            size = (min(step, stored.shape[0] - start), *stored.shape[1:])
            block = torch.empty(size, dtype=DTYPES[stored.dtype])
            read_all(self.storage, {stored.file: [Read(stored.slot, Box((start,) + (0,) * (len(size) - 1), size), block)]})
            yield block.float()


def load_whole(weights: HfWeights, name: str) -> Tensor:
    """One logical tensor in the type that it is best kept in."""
    tensor = torch.empty(weights.shapes[name], dtype=weights.dtype(name))
    weights.load_into({f"model/{name}": whole_tensor(tensor)})
    return tensor


def _reads(place: Place, stored: StoredTensor, wanted: ShardedTensor) -> Iterator[Read]:
    for held in wanted.held():
        for here, there in place.pieces(wanted.shape, held.box):
            target = held.tensor.detach()
            for dim, (offset, length) in enumerate(zip(here.offset, here.size, strict=True)):
                target = target.narrow(dim, offset - held.box.offset[dim], length)
            yield Read(stored.slot, there, target.t() if place.transposed else target)


def _full_names(stored: StoredModel, family: Family) -> dict[str, StoredTensor]:
    """Some published checkpoints are of the model without its head and leave out the prefix."""
    if any(name.startswith(family.prefix) for name in stored.tensors):
        return dict(stored.tensors)
    return {name if name.startswith("lm_head.") else family.prefix + name: tensor for name, tensor in stored.tensors.items()}


def _fp8_block(config: Mapping[str, object], where: str) -> tuple[int, int]:
    found = config.get("quantization_config")
    if found is None:
        return 128, 128
    method = found.get("quant_method") if isinstance(found, dict) else found
    block = found.get("weight_block_size") if isinstance(found, dict) else None
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        text = f"quantization_config with quant_method={method!r} and weight_block_size={block!r} is not supported"
        raise ConfigProblem(f"{where}: {text}; known: 'fp8' with two sizes of a block. Use the unquantised model")
    return int(block[0]), int(block[1])


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
