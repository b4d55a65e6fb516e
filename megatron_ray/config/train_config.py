"""The whole tree a training run needs.

Owns: reading, resolving, writing it. Must not know: jobs, clusters, Ray.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field

from megatron_ray.config.base import Config
from megatron_ray.config.checkpoint import CheckpointConfig, StorageConfig
from megatron_ray.config.data import DataConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.training import TrainingConfig


class TrainConfig(Config):
    """Model, layout, data, loop, optimizer, checkpoints and where to write them."""

    model: ModelConfig
    """Architecture."""
    parallel: ParallelismConfig = ParallelismConfig()
    """Layout over ranks."""
    data: DataConfig
    """What to train on."""
    training: TrainingConfig
    """Batch, steps, precision."""
    optimizer: OptimizerConfig
    """Update rule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save."""
    storage: StorageConfig | None = Field(default=None)
    """Where to write; whoever starts the run fills it when not given."""

    @property
    def data_cache(self) -> str | None:
        """Folder of prepared data and indices; None where neither data.cache nor
        storage.path is given.
        """
        if self.data.cache or self.storage is None:
            return self.data.cache or None
        return f"{self.storage.path.rstrip('/')}/data"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validates a mapping; raises pydantic.ValidationError with one entry per wrong
        field.
        """
        return cls.model_validate(dict(values))

    def to_json(self) -> str:
        """Resolved form: every field spelt out, readable by `from_mapping`."""
        return self.model_dump_json(indent=2)


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads YAML or JSON. Raises ValueError with the file's name when it is not a
    mapping.
    """
    text = path.read_text()
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML or JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds {type(values).__name__}, expected a mapping of fields"
        )
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`path.to.field=value` (value read as YAML) over a mapping; returns a new one.

    Raises ValueError on bad syntax.
    """
    result = json.loads(json.dumps(values))
    for override in overrides:
        path, equals, raw = override.partition("=")
        if not equals or not path:
            raise ValueError(f"--set {override!r}: expected path.to.field=value")
        node = result
        *parents, leaf = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"--set {override!r}: {key!r} is a value, not a group of fields"
                )
        try:
            node[leaf] = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set {override!r}: the value is not valid YAML; put it in quotes"
            ) from error
    return result  # type: ignore[no-any-return]
