"""Lists the known families, and finds the family of a config.json or of a model.

Pure. Must not know: files, torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from megatron_ray.checkpoint.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_ray.checkpoint.hf.families.dense import (
    GEMMA,
    GRANITE,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
)
from megatron_ray.checkpoint.hf.families.experts import MIXTRAL, QWEN3_MOE
from megatron_ray.checkpoint.hf.families.family import Family, UnsupportedFieldError
from megatron_ray.checkpoint.hf.families.gpt2 import GPT2
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError, Problem
from megatron_ray.validation.initial_weights import model_signature

FAMILIES = {
    family.model_type: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GRANITE,
        MIXTRAL,
        QWEN3_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
    )
}


def find_family(values: Mapping[str, Any], where: str) -> Family:
    """Returns the family of a config.json, by `model_type` or else by `architectures`.

    Raises ConfigError for an unknown family, and where the two keys contradict.
    """
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    # A folder may lack one of the two keys, but they must not contradict each other.
    family = FAMILIES.get(str(model_type)) or _family_of_class(architectures)
    if family is not None and (not architectures or family.architecture in architectures):
        return family
    known = []
    for family in FAMILIES.values():
        known.append(f"{family.model_type} ({family.architecture})")
    raise ConfigError(
        f"{where}: model_type={model_type!r} with architectures={architectures!r} is not "
        f"supported; known: {', '.join(known)}"
    )


def _family_of_class(architectures: Sequence[str]) -> Family | None:
    for name in architectures:
        for family in FAMILIES.values():
            if family.architecture == name:
                return family
    return None


def read_model(family: Family, values: Mapping[str, Any], where: str) -> ModelConfig:
    """Returns the model that a config.json describes.

    Raises ConfigError for values that are not supported or not valid.
    """
    fields = family.read(HfConfig(values, where))
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        details = []
        for item in error.errors():
            details.append(f"model.{'.'.join(map(str, item['loc']))}: {item['msg']}")
        raise ConfigError(
            f"{where} does not describe a model: {'; '.join(details)}"
        ) from error


def family_for(model: ModelConfig, published_as: Family | None = None) -> Family:
    """Returns the family that a model can be exported as.

    It is the one that its weights were published as, if any and if the model still is
    one of it. Raises ConfigError with the field that its nearest family does not
    support.
    """
    if published_as is not None and _unsupported(published_as, model) is None:
        return published_as
    nearest = _nearest(model)
    unsupported = _unsupported(nearest, model)
    if unsupported is not None:
        raise unsupported
    return nearest


def export_warnings(model: ModelConfig) -> list[Problem]:
    """Returns the field because of which checkpoints of a model cannot be exported.

    The model's vocabulary may be unknown.
    """
    # Every family has any vocabulary.
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": 2})
    unsupported = _unsupported(_nearest(model), model)
    if unsupported is None:
        return []
    pointer = f"/model/{unsupported.field.replace('.', '/')}"
    detail = f"checkpoints cannot be exported in Hugging Face's format: {unsupported}"
    return [Problem(pointer, "not_exportable", detail)]


def _unsupported(family: Family, model: ModelConfig) -> UnsupportedFieldError | None:
    """Returns why a model is not one of a family, or None."""
    # A family supports a model if writing and reading its config.json preserves the model.
    try:
        values = family.write(model)
    except UnsupportedFieldError as error:
        detail = str(error).removeprefix(f"model.{error.field}")
        return UnsupportedFieldError(error.field, f"{detail} ({family.model_type})")
    signature = model_signature(read_model(family, values, family.model_type))
    for field, value in model_signature(model).items():
        if signature.get(field) != value:
            detail = (
                f"={value!r} cannot be expressed in the config.json of {family.model_type}, "
                f"the nearest known family (it would be read as {signature.get(field)!r})"
            )
            return UnsupportedFieldError(field, detail)
    return None


def _nearest(model: ModelConfig) -> Family:
    # Features from the rarest to the most common: only the first matching family can
    # express the model.
    if model.position_embedding == "learned" or model.norm == "layernorm":
        return GPT2
    if model.mla is not None:
        return _nearest_of_deepseek(model)
    if model.moe is not None:
        return QWEN3_MOE if model.qk_norm else MIXTRAL
    if model.zero_centered_norm or model.activation == "geglu_tanh":
        return GEMMA
    if _has_multipliers(model):
        return GRANITE
    if model.qk_norm:
        return QWEN3
    if model.has_qkv_bias and not model.has_attention_output_bias:
        return QWEN2
    return MISTRAL if model.sliding_window is not None else LLAMA


def _has_multipliers(model: ModelConfig) -> bool:
    """Returns whether a model has one of Granite's factors, as those of muP are."""
    if model.attention_scale is not None:
        return True
    return (model.embedding_scale, model.residual_factor, model.logit_factor) != (1, 1, 1)


def _nearest_of_deepseek(model: ModelConfig) -> Family:
    if model.moe is not None and model.moe.score_function == "softmax":
        return DEEPSEEK_V2
    return DEEPSEEK_V3
