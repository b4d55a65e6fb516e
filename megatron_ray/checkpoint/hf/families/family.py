"""What a family of published models is.

Owns: the shape of that statement. Pure; must not know: any family, files, torch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ray.checkpoint.hf.options import Options
from megatron_ray.checkpoint.hf.places import Rule
from megatron_ray.config.model import ModelConfig


def no_copies(model: ModelConfig) -> dict[str, str]:
    """For families whose checkpoints store every tensor once."""
    return {}


def all_present(model: ModelConfig, names: Collection[str]) -> ModelConfig:
    """For families whose files hold what config.json says."""
    return model


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers: its config.json and the names of its tensors,
    both ways.
    """

    model_type: str
    architecture: str
    """Class that transformers makes of it."""
    read: Callable[[Options], dict[str, Any]]
    """config.json -> fields of ModelConfig. Raises ConfigError for what a ModelConfig
    cannot say."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """ModelConfig -> config.json, as far as the family can say it (see
    `writing_problems`)."""
    rules: Callable[[ModelConfig], Sequence[Rule]]
    """Where logical tensors are stored."""
    prefix: str = "model."
    """Of the names of the model without its head; some published checkpoints leave it
    out."""
    ignored: Sequence[str] = ("*.rotary_emb.inv_freq",)
    """Stored tensors that are computed, not learned: patterns."""
    copies: Callable[[ModelConfig], Mapping[str, str]] = no_copies
    """Stored tensor -> the stored tensor that it repeats."""
    present: Callable[[ModelConfig, Collection[str]], ModelConfig] = all_present
    """The model without parts that config.json speaks of and that are not among the
    stored names."""
