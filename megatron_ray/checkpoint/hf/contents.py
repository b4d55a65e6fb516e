"""Whether a Hugging Face folder is what its config.json says.

Owns: finding the place of every logical tensor, refusing what is missing, too much or
of another shape. Reads headers only. Torch-free; must not know: what is done with the
tensors.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property

from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.table import family_named, read_model
from megatron_ray.checkpoint.hf.files import (
    CONFIG,
    ELEMENT_BYTES,
    FP8,
    StoredModel,
    StoredTensor,
    open_folder,
)
from megatron_ray.checkpoint.hf.places import Place, find_places
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.sharding.parameters import logical_parameters

SCALES = "_scale_inv"
"""Ends the name of the tensor with a factor for each block of an fp8 weight."""
_SHOWN = 4
_ROUTER = "moe.router.weight"
_BIAS = "moe.expert_bias"

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
    """All that a checkpoint has of a model, in forward order: parameters, and balancing
    biases of experts.
    """
    found: dict[str, tuple[int, ...]] = {}
    for parameter in logical_parameters(model):
        found[parameter.name] = parameter.shape
        if (
            parameter.name.endswith(_ROUTER)
            and model.moe is not None
            and model.moe.expert_bias
        ):
            found[parameter.name.removesuffix(_ROUTER) + _BIAS] = parameter.shape[:1]
    return found


class HfFolder:
    """An opened folder whose names and shapes are those of its config.json.

    Raises CheckpointError for damaged files, ConfigError for an unknown family, for
    options that are not supported and for tensors that contradict config.json.
    """

    def __init__(self, path: str) -> None:
        stored = open_folder(path)
        self.path = path
        self.config = stored.config
        self.storage = stored.storage
        where = stored.storage.uri(CONFIG)
        self.family = family_named(stored.config, where)
        self.block = _fp8_block(stored.config, where)
        self.tensors = _full_names(stored, self.family)
        self.model = self.family.present(
            read_model(self.family, stored.config, where), self.tensors
        )
        self.shapes = logical_shapes(self.model)
        self.places = self._find_places()
        self._check_shapes()

    def _find_places(self) -> dict[str, Place]:
        """Raises ConfigError when a tensor is missing, or one is there that the model
        does not have.
        """
        found = find_places(self.family.rules(self.model), self.shapes)
        places = {name: place for name, place in found.items() if place is not None}
        if len(places) < len(found):
            unknown = [name for name, place in found.items() if place is None]
            raise ConfigError(
                f"{self.path}: {self.family.model_type} has no tensor for {_some(unknown)}"
            )
        needed = {place.name for place in places.values()}
        if missing := sorted(needed - self.tensors.keys()):
            raise ConfigError(
                f"{self.path} lacks {len(missing)} of the {len(needed)} tensors that its "
                f"{CONFIG} asks for: {_some(missing)}"
            )
        known = (
            needed
            | self.copies.keys()
            | {name + SCALES for name in needed if self.tensors[name].dtype == FP8}
        )
        if extra := sorted(
            name for name in self.tensors.keys() - known if not self._ignored(name)
        ):
            text = (
                f"{self.path} holds {len(extra)} tensors that a {self.family.model_type} model "
                f"of {self.model.num_layers} layers"
            )
            raise ConfigError(
                f"{text}, as its {CONFIG} describes it, does not have: {_some(extra)}"
            )
        return places

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """Stored tensor -> the one that it repeats, where both are there."""
        found = dict(self.family.copies(self.model))
        if self.model.tie_embeddings:
            found["lm_head.weight"] = find_places(
                self.family.rules(self.model), ["embedding.weight"]
            )["embedding.weight"].name  # type: ignore[union-attr]
        return {name: original for name, original in found.items() if name in self.tensors}

    def _ignored(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.family.ignored) or (
            name.endswith(SCALES) and name.removesuffix(SCALES) in self.copies
        )

    def _check_shapes(self) -> None:
        for name, place in self.places.items():
            stored = self.tensors[place.name]
            expected = place.stored_shape(self.shapes[name])
            if stored.dtype not in ELEMENT_BYTES:
                raise ConfigError(
                    f"{self.path}: tensor {place.name!r} has type {stored.dtype}, which is "
                    "not supported"
                )
            if stored.shape != expected:
                field = next(
                    (
                        text
                        for pattern, text in _FIELDS.items()
                        if fnmatchcase(name, pattern)
                    ),
                    "hidden_size",
                )
                text = (
                    f"tensor {place.name!r} has shape {list(stored.shape)}, {list(expected)} "
                    "is expected"
                )
                raise ConfigError(
                    f"{self.path}: {text} from {CONFIG}; look at model.{field}"
                )
            if stored.dtype == FP8:
                self._check_scales(stored)

    def _check_scales(self, stored: StoredTensor) -> None:
        scales = self.tensors.get(stored.name + SCALES)
        wanted = tuple(
            -(-size // block) for size, block in zip(stored.shape, self.block, strict=False)
        )
        if scales is None or scales.shape != wanted or len(stored.shape) != 2:
            text = (
                f"fp8 tensor {stored.name!r} of shape {list(stored.shape)} needs a factor for "
                f"each block of {list(self.block)}"
            )
            there = (
                "there is none"
                if scales is None
                else f"{scales.name!r} has shape {list(scales.shape)}"
            )
            raise ConfigError(f"{self.path}: {text}, and {there}")


def _full_names(stored: StoredModel, family: Family) -> dict[str, StoredTensor]:
    """Some published checkpoints are of the model without its head and leave out the
    prefix.
    """
    if any(name.startswith(family.prefix) for name in stored.tensors):
        return dict(stored.tensors)
    return {
        name if name.startswith("lm_head.") else family.prefix + name: tensor
        for name, tensor in stored.tensors.items()
    }


def _fp8_block(config: Mapping[str, object], where: str) -> tuple[int, int]:
    found = config.get("quantization_config")
    if found is None:
        return 128, 128
    method = found.get("quant_method") if isinstance(found, dict) else found
    block = found.get("weight_block_size") if isinstance(found, dict) else None
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        text = (
            f"quantization_config with quant_method={method!r} and weight_block_size={block!r} "
            "is not supported"
        )
        raise ConfigError(
            f"{where}: {text}; known: 'fp8' with two sizes of a block. Use the unquantised model"
        )
    return int(block[0]), int(block[1])


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
