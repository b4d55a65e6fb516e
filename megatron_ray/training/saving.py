"""Saves a training run and resumes it.

Owns: the contents of a training run's checkpoints. Must not know: the commit.

Shapes on disk are logical and independent of the layout; state of a single rank (its
random stream) is stored in its own part.
"""

import base64
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_ray.checkpoint.directory import FORMAT_VERSION, checkpoint_path
from megatron_ray.checkpoint.hf.published.files import read_published
from megatron_ray.checkpoint.initial_weights import load_initial_weights
from megatron_ray.checkpoint.load import SavedCheckpoint
from megatron_ray.checkpoint.resume_config import CORPORA
from megatron_ray.checkpoint.train_state import TOKENIZER, read_train_state
from megatron_ray.checkpoint.writer import CheckpointWriter
from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.initialization import init_local
from megatron_ray.optimizer.loss_scale import LOSS_SCALE
from megatron_ray.optimizer.replica_groups.sync import OUTER
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.optimizer.step_rules import RULES
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.reports import CheckpointFailedReport, CheckpointReport
from megatron_ray.sharding.sharded_state import ShardedState, whole_tensor
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import open_storage
from megatron_ray.training.callbacks.runner import CallbackRunner
from megatron_ray.training.progress import Progress, SkippedSteps

_FP8 = "fp8/"
"""Prefix of the names of FP8 scales in checkpoints."""
_OF_GROUP = ("model/", "optimizer/")
"""Prefixes of the names of what may differ between replica groups."""


@dataclass(frozen=True)
class Extras:
    """What a run's checkpoints have beside weights, optimizer state and progress."""

    published: Mapping[str, bytes]
    """On rank 0, the files of a published model."""
    callbacks: CallbackRunner


class TrainingSaver:
    """Writes checkpoints of one rank: its optimizer shard and the run's progress.

    `report` gets a report when this rank's part is durable or could not be written; the
    run then goes on without it, for a while. Raises ConfigError without a storage path.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: ParallelMesh,
        model: ParallelModel,
        optimizer: ShardedOptimizer,
        data: PreparedData,
        *,
        attempt: int,
        report: Callable[[CheckpointReport | CheckpointFailedReport], None],
        extras: Extras,
    ) -> None:
        if config.storage is None:
            raise ConfigError("storage.path is not set; checkpoints have nowhere to go")
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._callbacks = extras.callbacks
        self._attempt = attempt
        self._storage_path = config.storage.path
        self._end_of_document = data.end_of_document
        self._begin_of_document = data.begin_of_document
        self._corpora = data.train_sizes
        # Make an export behave as the published model, after any number of runs.
        self.published = dict(extras.published)
        self._files = dict(self.published)
        if mesh.rank == 0:
            # Makes a copied checkpoint sufficient for generation.
            self._files[TOKENIZER] = read_file(data.tokenizer_path)
        self._writer = CheckpointWriter(mesh, config.checkpoint.mode, report, report)
        # Plans collectively which rank writes which box, so that a save needs no
        # collective.
        self._writer.prepare(self.state())
        self._saved_step: int | None = None

    def save(self, progress: Progress) -> None:
        """Copies the shard and starts writing it in the background.

        Waits for a running save first. Every rank must call it. Saves a step once.
        """
        if progress.step == self._saved_step:
            return
        self._saved_step = progress.step
        self.complete_state()
        path = checkpoint_path(self._storage_path, progress.step, self._attempt)
        self._writer.save(
            progress.step,
            path,
            self.state(),
            self.train_state(progress),
            self._files,
        )

    def wait(self) -> None:
        """Blocks until this rank's part of the last save is durable.

        Raises errors of the background write.
        """
        self._writer.wait()

    def close(self) -> None:
        """Ends the writer."""
        self._writer.close()

    def abandon(self) -> None:
        """Ends the writer without finishing a running save."""
        self._writer.abandon()

    def complete_state(self) -> None:
        """Completes the state of callbacks; every rank must call it before a copy."""
        self._callbacks.before_save()

    def state(self) -> ShardedState:
        """Returns all tensors in a checkpoint, as they are now."""
        state = training_state(self._model, self._optimizer)
        return state | self._callbacks.state()

    def train_state(self, progress: Progress) -> dict[str, Any]:
        """Returns the state other than tensors."""
        return {
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "planned_samples": progress.planned_samples,
            "skipped": asdict(progress.skipped),
            # Only fields of TrainConfig: a subclass (a job spec) may have fields that
            # readers of checkpoints do not know.
            "config": self._config.model_dump(
                mode="json", include=set(TrainConfig.model_fields)
            ),
            "end_of_document": self._end_of_document,
            "begin_of_document": self._begin_of_document,
            CORPORA: self._corpora,
            "rng": {
                "cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
            },
        }


def published_files(weights: str, start_from: str | None) -> dict[str, bytes]:
    """Returns the published files of the weights that a run begins with."""
    files = read_published(weights)
    # Checkpoints of earlier versions have none. What the run started from may have been
    # deleted since.
    if not files and start_from not in (None, weights):
        with suppress(StorageError):
            files = read_published(str(start_from))
    return files


def read_file(path: str) -> bytes:
    """Returns the content of a file at a path or URI. Raises StorageError."""
    folder, _, name = path.rpartition("/")
    return open_storage(folder or ".").read_bytes(name)


def training_state(model: ParallelModel, optimizer: ShardedOptimizer) -> ShardedState:
    """Returns all tensors in a checkpoint, as `ShardedOptimizer.sharded_state`.

    These are main parameters, moments, a loss scale, baselines of rules, balancing biases
    of experts, FP8 scales and the state of an outer optimizer. Weights and moments of the
    second replica group are `groups/1/model/...`, and so on; those of the first have the
    names of a run with a single group.
    """
    prefix = _group_prefix(optimizer)
    state: ShardedState = {}
    for name, tensor in _plain_state(model, optimizer).items():
        if name.startswith(_OF_GROUP) and name != LOSS_SCALE:
            name = prefix + name
        state[name] = tensor
    return state


def _group_prefix(optimizer: ShardedOptimizer) -> str:
    """Returns what the names of a replica group's tensors begin with."""
    if optimizer.group_sync is None or optimizer.group_sync.group_index == 0:
        return ""
    return f"groups/{optimizer.group_sync.group_index}/"


def _plain_state(model: ParallelModel, optimizer: ShardedOptimizer) -> ShardedState:
    """Returns the state by the names of a run with a single replica group."""
    state = optimizer.sharded_state()
    for name, bias in model.expert_biases.items():
        state[f"model/{name}"] = whole_tensor(bias.value)
    if model.delayed_scaling is not None:
        for name, tensor in model.delayed_scaling.state().items():
            state[_FP8 + name] = whole_tensor(tensor)
    return state


def resume(
    path: str,
    model: ParallelModel,
    optimizer: ShardedOptimizer,
    callbacks: ShardedState,
    rank: int,
) -> Progress:
    """Loads main parameters and moments from any layout and publishes the weights.

    Returns the run's progress. Raises CheckpointError.
    """
    saved = SavedCheckpoint(path)
    optimizer.begin_load()
    state = training_state(model, optimizer)
    starts_outer = _has(state, OUTER) and not _has(saved.tensors, OUTER)
    has_group = _has(saved.tensors, _group_prefix(optimizer))
    # A new replica group continues from the first one; all do where a new outer optimizer
    # needs equal weights.
    if starts_outer or not has_group:
        state = _plain_state(model, optimizer)
    for name in tuple(state):
        # A run that changes to fp16 or FP8 had no scales until now, or histories of another
        # length, and new rules have no baseline; it starts with new ones.
        is_of_run = name == LOSS_SCALE or name.startswith((_FP8, RULES, OUTER))
        tensor = saved.tensors.get(name)
        if is_of_run and (tensor is None or tensor.shape != state[name].shape):
            del state[name]
    for name, watched in callbacks.items():
        # What the run did not watch until now begins here.
        if name in saved.tensors:
            state[name] = watched
    saved.load_into(state)
    if starts_outer:
        optimizer.begin()
    return apply_train_state(read_train_state(path, rank), optimizer)


def apply_train_state(state: Mapping[str, Any], optimizer: ShardedOptimizer) -> Progress:
    """Continues from a saved state other than tensors, which are loaded already.

    Publishes the weights; returns the run's progress.
    """
    # Checkpoints of earlier versions have no skipped steps.
    skipped = SkippedSteps(**state.get("skipped", {}))
    progress = Progress(
        state["step"], state["consumed_samples"], _planned_samples(state), skipped
    )
    optimizer.set_steps_taken(progress.num_updates)
    optimizer.publish()
    # A rank that did not exist in the saving layout keeps the stream of its seed.
    if "rng" in state:
        raw = bytearray(base64.b64decode(state["rng"]["cpu"]))
        torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8).clone())
    return progress


def _planned_samples(state: Mapping[str, Any]) -> tuple[int, ...]:
    if "planned_samples" in state:
        return tuple(state["planned_samples"])
    # Earlier versions drew the order for the steps of their config.
    training = state["config"]["training"]
    return (training["steps"] * training["global_batch_size"],)


def _has(names: Iterable[str], prefix: str) -> bool:
    """Returns whether any name has a prefix."""
    return any(name.startswith(prefix) for name in names)


def start_from_weights(
    path: str, model: ParallelModel, optimizer: ShardedOptimizer, seed: int
) -> None:
    """Loads main parameters from a checkpoint or a Hugging Face folder.

    Moments and steps stay at zero. Tokens that the weights lack get rows drawn from
    `seed`, as in a new model. Raises CheckpointError, ConfigError.
    """

    def draw(logical_name: str) -> None:
        for parameter in model.parameters:
            if parameter.parts[0].logical.name == logical_name:
                optimizer.initialise(parameter.name, init_local(parameter, seed))

    optimizer.begin_load()
    load_initial_weights(path, _plain_state(model, optimizer), draw)
    optimizer.begin()
    optimizer.publish()
