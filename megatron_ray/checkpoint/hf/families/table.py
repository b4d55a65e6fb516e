"""The families that are known.

Owns: the list, which of them a config.json or a model belongs to, and what neither can
say. Pure.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_ray.checkpoint.hf.families.deepseek import DEEPSEEK_V3
from megatron_ray.checkpoint.hf.families.dense import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_ray.checkpoint.hf.families.experts import MIXTRAL, QWEN3_MOE
from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.gpt2 import GPT2
from megatron_ray.checkpoint.hf.options import Options
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


def family_named(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json, by `model_type` or else by `architectures`.

    Raises ConfigError.
    """
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    by_class = {family.architecture: family for family in FAMILIES.values()}
    named = FAMILIES.get(str(model_type)) or next(
        (by_class[name] for name in architectures if name in by_class), None
    )
    if named is not None and (not architectures or named.architecture in architectures):
        return named
    known = ", ".join(
        f"{family.model_type} ({family.architecture})" for family in FAMILIES.values()
    )
    raise ConfigError(
        f"{where}: model_type={model_type!r} with architectures={architectures!r} is not "
        f"supported; known: {known}"
    )


def read_model(family: Family, values: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes.

    Raises ConfigError for what is not supported or not sensible.
    """
    fields = family.read(Options(values, where))
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        found = (
            f"model.{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(
            f"{where} does not describe a model: {'; '.join(found)}"
        ) from error


def family_of(model: ModelConfig) -> Family:
    """The family that a model can be published as.

    Raises ConfigError with the field that its nearest family cannot say.
    """
    family = _nearest(model)
    try:
        read_back = model_signature(
            read_model(family, family.write(model), family.model_type)
        )
    except ConfigError as problem:
        raise ConfigError(
            f"the model cannot be written as {family.model_type}: {problem}"
        ) from problem
    for field, value in model_signature(model).items():
        if read_back[field] != value:
            text = (
                f"model.{field}={value!r} cannot be said in the config.json of "
                f"{family.model_type}, the nearest known family"
            )
            raise ConfigError(f"{text} (it would be read as {read_back[field]!r})")
    return family


def _nearest(model: ModelConfig) -> Family:
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
