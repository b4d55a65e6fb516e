"""Opens a folder in Hugging Face format and checks it against its config.json.

`HfFolder` is what the rest of the library uses: `model` is the model as a ModelConfig,
`shapes` lists its logical tensors, `locations` maps each to where it is stored. Missing
or unknown tensors and wrong shapes are errors. Only headers are read, and tensors that
are stored twice.

Torch-free. Must not know: what is done with the tensors (`weights` reads them).
"""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property

from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.registry import find_family, read_model
from megatron_ray.checkpoint.hf.files import (
    CONFIG,
    ELEMENT_BYTES,
    FP8,
    StoredModel,
    StoredTensor,
    open_folder,
)
from megatron_ray.checkpoint.hf.stored_values import have_equal_values
from megatron_ray.checkpoint.hf.tensor_locations import TensorLocation, find_locations
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.sharding.parameters import logical_parameters

HEAD = "lm_head.weight"
"""Name of the output head in every family."""
SCALES = "_scale_inv"
"""Suffix of the tensor with a factor for each block of an fp8 weight."""
_MAX_NAMES = 4
"""Maximum number of names in an error."""
_ROUTER = "moe.router.weight"
_EXPERT_BIAS = "moe.expert_bias"

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
    "*.moe.experts.*": "moe.num_experts or model.moe.ffn_hidden_size",
}
"""Fields that a tensor's shape depends on besides hidden_size, for errors. The first
pattern that matches its name counts."""


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a model in a checkpoint, in forward order.

    Those are the parameters, and the balancing biases of experts.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    has_expert_bias = model.moe is not None and model.moe.expert_bias
    for parameter in logical_parameters(model):
        shapes[parameter.name] = parameter.shape
        if has_expert_bias and parameter.name.endswith(_ROUTER):
            prefix = parameter.name.removesuffix(_ROUTER)
            shapes[prefix + _EXPERT_BIAS] = parameter.shape[:1]
    return shapes


class HfFolder:
    """An opened folder whose tensors have the names and shapes that config.json implies.

    Raises CheckpointError for damaged files, and ConfigError for an unknown family, for
    unsupported options and for tensors that contradict config.json.
    """

    def __init__(self, path: str) -> None:
        stored = open_folder(path)
        where = stored.storage.uri(CONFIG)
        self.path = path
        self.config = stored.config
        """Values of config.json."""
        self.storage = stored.storage
        self.family = find_family(stored.config, where)
        self.block = _fp8_block(stored.config, where)
        """Rows and columns of the blocks of fp8 weights."""
        self.tensors = _full_names(stored, self.family)
        """Stored tensors by name."""
        self.notes: list[str] = []
        """What a user may not expect of this folder, in sentences."""
        # config.json may list parts of the model that the files do not contain.
        model = read_model(self.family, stored.config, where)
        model = self.family.present(model, self.tensors)
        self.model = self._with_stored_head(model)
        """The model of the tensors in the files."""
        self.shapes = logical_shapes(self.model)
        """Logical tensors by name."""
        self.locations = self._find_locations()
        """Location of each logical tensor in the files."""
        self._check_names()
        # Names are checked before shapes, so that a wrong number of layers is not reported
        # as a wrong shape.
        for name in self.locations:
            self._check_shape(name)

    def _with_stored_head(self, model: ModelConfig) -> ModelConfig:
        """Returns the model with a head of its own where the files have one.

        Some programs save such a head with a config.json for a tied one; transformers
        uses the head. One without an embedding is taken for both.
        """
        name = _embedding_name(self.family, model)
        embedding = self.tensors.get(name)
        head = self.tensors.get(HEAD)
        if not model.tie_embeddings or head is None:
            return model
        # Of two equal tensors some programs save the head only.
        if embedding is None:
            self.tensors[name] = replace(self.tensors.pop(HEAD), name=name)
            return model
        # A head that repeats the embedding is stored by some programs too.
        if have_equal_values(self.storage, head, embedding):
            return model
        self.notes.append(
            f"{self.path}: {HEAD} differs from {embedding.name}, so it is used as a head of "
            f"its own, although tie_word_embeddings is true in {CONFIG} (the default of some "
            "families)"
        )
        return model.model_copy(update={"tie_embeddings": False})

    def _find_locations(self) -> dict[str, TensorLocation]:
        """Raises ConfigError when the family has no name for a tensor of the model."""
        locations = dict[str, TensorLocation]()
        unknown = []
        candidates = find_locations(self.family.rules(self.model), self.shapes)
        # A file may have a part of the tensors in another layout.
        for rules in self.family.other_layouts(self.model):
            for name, location in find_locations(rules, self.shapes).items():
                if location is not None and location.name in self.tensors:
                    candidates[name] = location
        for name, location in candidates.items():
            if location is None:
                unknown.append(name)
            else:
                locations[name] = location
        if unknown:
            raise ConfigError(
                f"{self.path}: {self.family.model_type} has no tensor for {_some(unknown)}"
            )
        return locations

    def _check_names(self) -> None:
        """Raises ConfigError for missing tensors and for tensors that the model lacks."""
        # One stored tensor may contain several logical tensors.
        needed = {location.name for location in self.locations.values()}
        missing = sorted(needed - self.tensors.keys())
        unknown = self.tensors.keys() - needed - self.copies.keys()
        extra = sorted(name for name in unknown if not self._is_expected(name, needed))
        if missing == [HEAD]:
            raise ConfigError(
                f"{self.path} lacks {HEAD}, which its {CONFIG} asks for with "
                "tie_word_embeddings=false (the default of some families); set it to true "
                "there if the head is the embedding, or download the missing file"
            )
        if missing:
            reason = (
                f"{self.path} lacks {len(missing)} of the {len(needed)} tensors that its "
                f"{CONFIG} asks for: {_some(missing)}"
            )
            # These may be the same weights in a layout that is not known here.
            if extra:
                reason += (
                    f"; it holds {len(extra)} others that are not known: {_some(extra)}"
                )
            else:
                reason += (
                    f"; download its files again, or correct {CONFIG} if the model has no "
                    "such tensors"
                )
            raise ConfigError(reason)
        if extra:
            raise ConfigError(
                f"{self.path} holds {len(extra)} tensors that a {self.family.model_type} model "
                f"of {self.model.num_layers} layers, as its {CONFIG} describes it, does not "
                f"have: {_some(extra)}; correct {CONFIG} if they are part of the model, or take "
                "them out of the files"
            )

    def _is_expected(self, name: str, needed: set[str]) -> bool:
        """Returns whether the files may contain a tensor that is not a weight."""
        if any(fnmatchcase(name, pattern) for pattern in self.family.ignored):
            return True
        if not name.endswith(SCALES):
            return False
        # Scaling factors belong to an fp8 weight, or to a copy, which is not read.
        weight = name.removesuffix(SCALES)
        if weight in self.copies:
            return True
        stored = self.tensors.get(weight)
        return weight in needed and stored is not None and stored.dtype == FP8

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """Maps stored tensors to the tensors that they copy, where both exist."""
        # With tied embeddings some files contain the head too, others do not.
        copies = dict(self.family.copies(self.model))
        if self.model.tie_embeddings:
            copies[HEAD] = _embedding_name(self.family, self.model)
        return {copy: name for copy, name in copies.items() if copy in self.tensors}

    def check_copies(self) -> None:
        """Compares tensors that the files have twice and the model has once.

        Raises ConfigError where the two differ.
        """
        for copy, original in self.copies.items():
            # A tied head has been compared already.
            if copy == HEAD:
                continue
            if not have_equal_values(
                self.storage, self.tensors[copy], self.tensors[original]
            ):
                raise self.unequal(copy, original)

    def unequal(self, copy: str, original: str) -> ConfigError:
        """Returns the error to raise for a copy that differs."""
        return ConfigError(
            f"{self.path}: tensor {copy!r} differs from {original!r}, but the model has them "
            f"once ({CONFIG}: num_nextn_predict_layers); leave out the tensors of these "
            "layers and set that to 0, or store the two alike"
        )

    def _check_shape(self, name: str) -> None:
        """Raises ConfigError when a logical tensor is stored in another shape or type."""
        location = self.locations[name]
        stored = self.tensors[location.name]
        expected = location.stored_shape(self.shapes[name])
        if stored.dtype not in ELEMENT_BYTES:
            raise ConfigError(
                f"{self.path}: tensor {location.name!r} has type {stored.dtype}, which is "
                "not supported"
            )
        if stored.shape != expected:
            hint = f"look at model.{_field_of(name)}"
            if sorted(stored.shape) == sorted(expected):
                hint = (
                    "its dimensions are in another order, which is not read: transpose it"
                )
            raise ConfigError(
                f"{self.path}: tensor {location.name!r} has shape {list(stored.shape)}, "
                f"{list(expected)} is expected from {CONFIG}; {hint}"
            )
        if stored.dtype == FP8:
            self._check_scales(stored)

    def _check_scales(self, stored: StoredTensor) -> None:
        """Raises ConfigError when an fp8 weight has no factor for each of its blocks."""
        scales = self.tensors.get(stored.name + SCALES)
        expected = []
        for size, block in zip(stored.shape, self.block, strict=False):
            expected.append(-(-size // block))
        if scales is None:
            problem = "there is none"
        elif scales.shape != tuple(expected) or len(stored.shape) != 2:
            problem = f"{scales.name!r} has shape {list(scales.shape)}"
        else:
            return
        raise ConfigError(
            f"{self.path}: fp8 tensor {stored.name!r} of shape {list(stored.shape)} needs a "
            f"factor for each block of {list(self.block)}, and {problem}"
        )


def _embedding_name(family: Family, model: ModelConfig) -> str:
    rules = family.rules(model)
    location = find_locations(rules, ["embedding.weight"])["embedding.weight"]
    assert location is not None
    return location.name


def _field_of(name: str) -> str:
    for pattern, field in _FIELDS.items():
        if fnmatchcase(name, pattern):
            return field
    return "hidden_size"


def _full_names(stored: StoredModel, family: Family) -> dict[str, StoredTensor]:
    """Returns the stored tensors by full name.

    Some published checkpoints were saved without the head; their names lack the prefix.
    """
    if any(name.startswith(family.prefix) for name in stored.tensors):
        return dict(stored.tensors)
    tensors = {}
    for name, tensor in stored.tensors.items():
        if name.startswith("lm_head."):
            tensors[name] = tensor
        else:
            full_name = family.prefix + name
            tensors[full_name] = replace(tensor, name=full_name)
    return tensors


def _fp8_block(config: Mapping[str, object], where: str) -> tuple[int, int]:
    """Returns the rows and columns of fp8 blocks; DeepSeek-V3's when none are given."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return 128, 128
    method: object = quantization
    block: object = None
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
        block = quantization.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise ConfigError(
            f"{where}: quantization_config with quant_method={method!r} and "
            f"weight_block_size={block!r} is not supported; known: 'fp8' with two sizes of a "
            "block. Use the unquantised model"
        )
    return int(block[0]), int(block[1])


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:_MAX_NAMES])
    if len(names) > _MAX_NAMES:
        return f"{listed} and {len(names) - _MAX_NAMES} more"
    return listed
