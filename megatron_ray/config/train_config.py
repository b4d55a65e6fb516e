"""Defines the complete config of a training run.

Owns: reading, overriding and writing it. Must not know: jobs, clusters, Ray.
"""

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field

from megatron_ray.config.base import Config
from megatron_ray.config.callbacks.monitors import CallbacksConfig
from megatron_ray.config.checkpoint import CheckpointConfig, StorageConfig
from megatron_ray.config.data import DataConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.parsing.json_values import read_json, require_json
from megatron_ray.config.parsing.yaml_values import read_yaml
from megatron_ray.config.schedules.rates import ScheduleConfig
from megatron_ray.config.training import LENGTHS, TrainingConfig


class TrainConfig(Config):
    """All parameters of a training run."""

    model: ModelConfig
    """Architecture of the model."""
    parallel: ParallelismConfig = ParallelismConfig()
    """How the model is spread over ranks. Default: data parallelism only."""
    data: DataConfig
    """Training and validation data, and the tokenizer."""
    training: TrainingConfig
    """Batch, steps, precision, recomputation and evaluation."""
    optimizer: OptimizerConfig
    """Optimizer and its hyperparameters."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps. Default: cosine decay to 0 without warm-up."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved. Default: one after the last step."""
    callbacks: CallbacksConfig = CallbacksConfig()
    """What is watched while the model trains. Default: nothing."""
    storage: StorageConfig | None = Field(default=None)
    """Where files are written. Default: chosen by whatever starts the run."""

    @property
    def data_cache(self) -> str | None:
        """Folder of prepared data and sample indices.

        None when neither data.cache nor storage.path is given.
        """
        if self.data.cache:
            return self.data.cache
        if self.storage is None:
            return None
        return f"{self.storage.path.rstrip('/')}/data"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validates a mapping of fields.

        Raises pydantic.ValidationError with one entry per wrong field.
        """
        return cls.model_validate(dict(values))

    def to_json(self) -> str:
        """Returns the config with every field written out, for `from_mapping`."""
        return self.model_dump_json(indent=2)


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file.

    Raises OSError, and ValueError with the file's name when it is not a mapping, or has a
    value that no JSON spec could have.
    """
    content = _decoded(path.read_bytes())
    try:
        if path.suffix == ".json":
            values = read_json(content)
        else:
            values = read_yaml(content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML or JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a spec") from error
    if values is None:
        raise ValueError(f"{path} is empty, expected a mapping of fields")
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds {type(values).__name__}, expected a mapping of fields"
        )
    require_json(values, str(path))
    return values


def _decoded(content: bytes) -> str:
    """Returns the text of a file, whose encoding a byte order mark may name."""
    # Windows PowerShell writes UTF-16.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")


def without_lengths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping without the length of the training, which another replaces."""
    training = values.get("training")
    if not isinstance(training, Mapping):
        return dict(values)
    kept = {name: value for name, value in training.items() if name not in LENGTHS}
    return {**values, "training": kept}


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of a mapping with `path.to.field=value` overrides applied.

    Items of lists have numbers from 0, as in `data.train.0.path`. Each value is read as
    it is in a YAML file. A length of the training replaces one that is given in another
    unit. Raises ValueError when an override is malformed.
    """
    # A round trip through JSON copies deeply.
    result: dict[str, Any] = json.loads(json.dumps(values))
    overrides = tuple(overrides)
    overridden = {override.partition("=")[0] for override in overrides}
    if overridden.intersection(f"training.{length}" for length in LENGTHS):
        result = without_lengths(result)
    for override in overrides:
        path, equals, raw_value = override.partition("=")
        if not equals or not path:
            raise ValueError(f"--set {override!r}: expected path.to.field=value")
        try:
            value = read_yaml(raw_value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(
                f"--set {override!r}: the value is not valid YAML; put it in quotes"
            ) from error
        try:
            _set(result, path.strip().split("."), value)
        except _PathError as error:
            raise ValueError(f"--set {override!r}: {error}") from error
    require_json(result, "--set")
    return result


class _PathError(ValueError):
    """A path leads to nothing that can be set."""


def _set(node: Any, path: list[str], value: Any) -> None:
    """Sets a field of nested mappings and lists; mappings on the way are made."""
    name, *rest = path
    key: str | int = name
    if isinstance(node, list):
        key = _index(node, name)
    if not rest:
        node[key] = value
        return
    if isinstance(node, dict):
        node.setdefault(name, {})
    if not isinstance(node[key], dict | list):
        raise _PathError(f"{name!r} is a value, not a group of fields")
    _set(node[key], rest, value)


def _index(items: list[Any], name: str) -> int:
    if name.isdecimal() and int(name) < len(items):
        return int(name)
    raise _PathError(f"{name!r} is no item of a list with {len(items)}, numbered from 0")
