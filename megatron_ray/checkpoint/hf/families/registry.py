"""Lists the known families, and finds the family of a config.json or of a model.

Pure. Must not know: files, torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from megatron_ray.checkpoint.hf.families.deepseek import DEEPSEEK_V3
from megatron_ray.checkpoint.hf.families.dense import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_ray.checkpoint.hf.families.experts import MIXTRAL, QWEN3_MOE
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.gpt2 import GPT2
from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError
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
        MIXTRAL,
        QWEN3_MOE,
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


def family_for(model: ModelConfig) -> Family:
    """Returns the family that a model can be exported as.

    Raises ConfigError with the field that its nearest family does not support.
    """
    family = _nearest(model)
    # A family supports a model if writing and reading its config.json preserves the model.
    try:
        read_back = read_model(family, family.write(model), family.model_type)
    except ConfigError as error:
        raise ConfigError(
            f"the model cannot be written as {family.model_type}: {error}"
        ) from error
    signature = model_signature(read_back)
    for field, value in model_signature(model).items():
        if signature[field] != value:
            raise ConfigError(
                f"model.{field}={value!r} cannot be expressed in the config.json of "
                f"{family.model_type}, the nearest known family (it would be read as "
                f"{signature[field]!r})"
            )
    return family


def _nearest(model: ModelConfig) -> Family:
    # Features from the rarest to the most common: only the first matching family can
    # express the model.
    if model.position_embedding == "learned" or model.norm == "layernorm":
        return GPT2
    if model.mla is not None:
        return DEEPSEEK_V3
    if model.moe is not None:
        return QWEN3_MOE if model.qk_norm else MIXTRAL
    if model.zero_centered_norm or model.activation == "geglu_tanh":
        return GEMMA
    if model.qk_norm:
        return QWEN3
    if model.qkv_bias:
        return QWEN2
    return MISTRAL if model.sliding_window is not None else LLAMA
