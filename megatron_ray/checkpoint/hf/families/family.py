"""Defines the description of a family of published models.

Pure. Must not know: any family, files, torch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.checkpoint.hf.tensor_locations import Rule
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError


class UnsupportedFieldError(ConfigError):
    """A family has no place for the value of a field of ModelConfig."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"model.{field}{detail}")
        self.field = field
        """Dotted name of the field."""


def no_copies(model: ModelConfig) -> dict[str, str]:
    """Returns no copies, for families that store every tensor once."""
    return {}


def no_layouts(model: ModelConfig) -> list[list[Rule]]:
    """Returns no further layouts, for families that are stored in one way."""
    return []


def all_present(model: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Returns the model unchanged, for families with files that match config.json."""
    return model


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers: how to read and write its config.json and names."""

    model_type: str
    architecture: str
    """Name of its class in transformers."""
    read: Callable[[HfConfig], dict[str, Any]]
    """Reads config.json into fields of ModelConfig. Raises ConfigError for unsupported
    values."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Writes a ModelConfig as values of config.json. Fields that the family does not have
    are left out; `registry.family_for` finds them by reading the values again. Raises
    UnsupportedFieldError where that would not."""
    rules: Callable[[ModelConfig], Sequence[Rule]]
    """Returns where logical tensors are stored in published files and in exported ones."""
    prefix: str = "model."
    """Prefix of all tensor names except the head's; some published checkpoints omit
    it."""
    other_layouts: Callable[[ModelConfig], Sequence[Sequence[Rule]]] = no_layouts
    """Returns other places where a part of the logical tensors may be stored, as
    transformers names them in memory."""
    ignored: Sequence[str] = ("*.rotary_emb.inv_freq",)
    """Patterns of stored tensors that are computed, not learned."""
    copies: Callable[[ModelConfig], Mapping[str, str]] = no_copies
    """Returns stored tensor -> the stored tensor that it repeats."""
    present: Callable[[ModelConfig, Collection[str]], ModelConfig] = all_present
    """Returns the model without parts that config.json lists but whose tensors are not
    among the stored names."""
