"""Finds what a run begins with: a copy in memory, a checkpoint, given weights, its seed.

Owns: the order of these, and the checks of a run against the one that applies. Must not
know: what follows, Ray.
"""

from collections.abc import Mapping, Sequence

from megatron_ray.checkpoint.directory import DamagedCheckpointError
from megatron_ray.checkpoint.hf.published.files import inside_checkpoint
from megatron_ray.checkpoint.initial_model import initial_model, resolve_initial_model
from megatron_ray.checkpoint.initial_tokenizer import initial_tokenizer
from megatron_ray.checkpoint.resume_config import compare_with_checkpoint
from megatron_ray.checkpoint.train_state import saved_model
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError, Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.prepared import PreparedData
from megatron_ray.data.tokenizer_match import find_difference
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.training.progress import Progress
from megatron_ray.training.saving import (
    published_files,
    read_file,
    resume,
    start_from_weights,
)
from megatron_ray.training.state_copy import StateCopy, load_copy
from megatron_ray.validation.initial_weights import (
    with_latent_eps_of,
    with_vocabulary_of,
)


class RunOrigin:
    """What a run's weights and progress come from.

    The first that is there of `copy`, the checkpoint `resume_from` and `start_from`;
    else the seed. A copy was made by the same job with the same data, so nothing is
    read from storage to check it.
    """

    def __init__(
        self, start_from: str | None, resume_from: str | None, copy: StateCopy | None
    ) -> None:
        self._copy = copy
        self._start_from = start_from
        self._resume_from = resume_from
        if copy is not None:
            self._resume_from = None

    @property
    def has_weights(self) -> bool:
        """Whether weights are loaded, and need not be drawn from the seed."""
        return (self._copy, self._resume_from, self._start_from) != (None, None, None)

    def with_model(self, config: TrainConfig) -> TrainConfig:
        """Returns the config with the vocabulary of the run's weights.

        They may come from its own checkpoint, which also has the eps of the latents'
        norms. Raises ConfigError when the config's model differs from theirs.
        """
        saved = self._saved_model()
        if saved is not None:
            model = with_latent_eps_of(config.model, saved)
            if config.checkpoint.start_from is not None:
                model = with_vocabulary_of(model, saved)
            return config.model_copy(update={"model": model})
        if config.checkpoint.start_from is None:
            return config
        model, problems = resolve_initial_model(config.checkpoint, config.model)
        raise_for(problems)
        return config.model_copy(update={"model": model})

    def _saved_model(self) -> ModelConfig | None:
        """Returns the model of the run's own copy or checkpoint."""
        if self._copy is not None:
            return saved_model(f"the copy of step {self._copy.step}", self._copy.state)
        if self._resume_from is not None:
            return initial_model(self._resume_from)
        return None

    def check_tokenizer(self, data: PreparedData) -> None:
        """Raises ConfigError when the data have another tokenizer than the weights."""
        path = self._resume_from or self._start_from
        if path is None or self._copy is not None:
            return
        weights = initial_tokenizer(path)
        # Published weights may come without one.
        if weights.content is None:
            return
        content = read_file(data.tokenizer_path).decode()
        difference = find_difference(weights.content, content)
        if difference is not None:
            raise ConfigError(
                f"/data/tokenizer: the data were not made with the tokenizer of {path}: "
                f"{difference}; {weights.remedy}"
            )

    def check_changes(self, config: TrainConfig, data: PreparedData) -> bool:
        """Compares the config with the run's checkpoint.

        Returns whether the order of samples stays. Raises ConfigError for changes that
        are refused.
        """
        if self._resume_from is None:
            return True
        comparison = compare_with_checkpoint(self._resume_from, config, data.train_sizes)
        raise_for(comparison.problems)
        return not comparison.changes_order

    def published(self) -> Mapping[str, bytes]:
        """Returns the published files that the run's checkpoints are to have too."""
        if self._copy is not None:
            return self._copy.published
        path = self._resume_from or self._start_from
        if path is None:
            return {}
        return inside_checkpoint(published_files(path, self._start_from))

    def load(
        self,
        model: ParallelModel,
        optimizer: ShardedOptimizer,
        callbacks: ShardedState,
        rank: int,
        seed: int,
    ) -> Progress:
        """Loads weights, if there are any; returns the progress to continue from.

        The state of callbacks is that of the run itself, not that of given weights.
        """
        if self._copy is not None:
            return load_copy(self._copy, model, optimizer, callbacks)
        if self._resume_from is not None:
            return resume(self._resume_from, model, optimizer, callbacks, rank)
        if self._start_from is not None:
            # Unlike a checkpoint of the run's own, it has no older one in its place.
            try:
                start_from_weights(self._start_from, model, optimizer, seed)
            except DamagedCheckpointError as error:
                raise ConfigError(f"/checkpoint/start_from: {error}") from error
        return Progress()


def raise_for(problems: Sequence[Problem]) -> None:
    """Raises ConfigError with all problems, if there are any."""
    if problems:
        raise ConfigError(
            "; ".join(f"{problem.pointer}: {problem.detail}" for problem in problems)
        )
