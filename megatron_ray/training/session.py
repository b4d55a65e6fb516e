"""Assembles a run: mesh -> model -> optimizer -> checkpoint -> data -> loop.

Owns: that order, and the ten-line API. Must not know: Ray, HTTP, the environment.

Data are prepared before (megatron_ray.data.preparation), so a session starts in
seconds. The caller owns the process groups, so several sessions can run one after
another in a process.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_ray.checkpoint.directory import DamagedCheckpointError
from megatron_ray.checkpoint.initial_model import initial_model, resolve_initial_model
from megatron_ray.checkpoint.initial_tokenizer import initial_tokenizer
from megatron_ray.checkpoint.resume_config import compare_with_checkpoint
from megatron_ray.commands import Command
from megatron_ray.config.problem import ConfigError, Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.datasets import build_dataset, evaluation_sources
from megatron_ray.data.indexed import DamagedCorpusError
from megatron_ray.data.loader import BatchMaker, StepLoader, evaluation_batches
from megatron_ray.data.prepared import PreparedData
from megatron_ray.data.tokenizer_match import find_difference
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.initialization import init_local
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel, parallelize
from megatron_ray.reports import PhaseReport, Report
from megatron_ray.sharding.sequence_split import SequenceCut
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.evaluate import Evaluation
from megatron_ray.training.exits import with_time_limit
from megatron_ray.training.loop import Outcome, train
from megatron_ray.training.progress import Progress
from megatron_ray.training.saving import (
    TrainingSaver,
    read_file,
    resume,
    start_from_weights,
)
from megatron_ray.validation import check, resolution
from megatron_ray.validation.initial_weights import (
    with_latent_eps_of,
    with_vocabulary_of,
)


def discard_report(_: Report) -> None:
    """Ignores a report."""


def no_command() -> Command:
    """Returns no command to the loop."""
    return Command.CONTINUE


class TrainingSession:
    """Runs a resolved config on one rank.

    `report` gets a StepReport per step, EvalReports, a CheckpointReport when this
    rank's part of a checkpoint is durable (from the writer's thread) and PhaseReports
    of the start-up. `poll` is called once a step on every rank and must return at once.
    `resume_from` is the path of a committed checkpoint, of any layout; without it the
    run begins with checkpoint.start_from, or with weights drawn from the seed.

    Raises ConfigError when the config contradicts the mesh, the data, the weights it
    begins with or the checkpoint that it resumes from.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: ParallelMesh,
        data: PreparedData,
        *,
        report: Callable[[Report], None] = discard_report,
        poll: Callable[[], Command] = no_command,
        attempt: int = 1,
        resume_from: str | None = None,
    ) -> None:
        resolved = resolution.resolve(config, mesh.world_size)
        resolved = resolution.with_length(resolved, data.num_train_tokens)
        _check(resolved, mesh)
        resolved = _with_initial_vocabulary(resolved, resume_from)
        # Checked after preparation, because a BPE trained on little text may have fewer
        # tokens than requested.
        self.config = resolution.with_vocabulary(resolved, data.vocab_size, data.rows)
        _check_tokenizer(resume_from or self.config.checkpoint.start_from, data)
        self.mesh = mesh
        self._report = report
        self._poll = with_time_limit(poll, resolved.training.max_duration_s, mesh.rank)
        self._phase_start = time.monotonic()
        # Not use_deterministic_algorithms, which imports the compiler and takes a second.
        torch.set_deterministic_debug_mode(
            "error" if self.config.training.deterministic else "default"
        )
        torch.manual_seed(self.config.training.seed)
        is_same_order = True
        if resume_from is not None:
            comparison = compare_with_checkpoint(resume_from, self.config, data.train_sizes)
            _raise_for(comparison.problems)
            is_same_order = not comparison.changes_order
        start_from = None
        if resume_from is None:
            start_from = self.config.checkpoint.start_from
        has_weights = resume_from is not None or start_from is not None
        self.model, self.optimizer = build(self.config, mesh, initialise=not has_weights)
        self._end_phase("model")
        self._saver = TrainingSaver(
            self.config,
            mesh,
            self.model,
            self.optimizer,
            data,
            attempt=attempt,
            on_written=report,
            weights=resume_from or start_from,
        )
        progress = self._load(resume_from, start_from)
        self.progress = progress.planned_for(
            self.config.training.num_steps,
            self.config.training.global_batch_size,
            is_same_order=is_same_order,
        )
        self._end_phase("load" if has_weights else "saver")
        with _readable_corpora(self.config):
            self._components = TrainingComponents(
                self.config,
                mesh,
                self.model,
                self.optimizer,
                self._loader(data),
                self._evaluation(data),
                self._saver,
            )
        self._end_phase("data")

    def run(self) -> Outcome:
        """Trains to the end, to an agreed stop or to a limit of the config.

        The last checkpoint is durable when it returns. Raises NonFiniteLossError.
        """
        try:
            outcome = train(self._components, self.progress, self._report, self._poll)
        except BaseException:
            # A rank that has lost its peers must be able to restart without waiting for
            # slow storage.
            self._saver.abandon()
            raise
        self._saver.close()
        return outcome

    def _load(self, resume_from: str | None, start_from: str | None) -> Progress:
        """Loads a checkpoint or initial weights; returns the progress to continue from."""
        if resume_from is not None:
            return resume(resume_from, self.model, self.optimizer, self.mesh.rank)
        if start_from is not None:
            seed = self.config.training.seed
            # Unlike a checkpoint of the run's own, it has no older one in its place.
            try:
                start_from_weights(start_from, self.model, self.optimizer, seed)
            except DamagedCheckpointError as error:
                raise ConfigError(f"/checkpoint/start_from: {error}") from error
        return Progress()

    def _end_phase(self, name: str) -> None:
        now = time.monotonic()
        self._report(PhaseReport(name, now - self._phase_start))
        self._phase_start = now

    def _loader(self, data: PreparedData) -> StepLoader:
        training = self.config.training
        mesh = self.mesh
        # Samples of the whole run, also after a resume, because their order is drawn at
        # once.
        *earlier, num_samples = self.progress.planned_samples
        dataset = build_dataset(
            data.train,
            num_samples,
            training.seq_length,
            training.seed,
            self.config.data_cache,
            shuffle=self.config.data.shuffle,
            earlier=earlier,
        )
        return StepLoader(
            dataset,
            training.micro_batch_size,
            training.global_batch_size,
            mesh.dp_rank,
            mesh.dims.dp,
            batch_maker(self.config, mesh, data.end_of_document),
        )

    def _evaluation(self, data: PreparedData) -> Evaluation | None:
        """Returns the samples of the validation split; None when there are none."""
        training = self.config.training
        mesh = self.mesh
        make_batch = batch_maker(self.config, mesh, data.end_of_document)
        num_tokens = sum(corpus.num_tokens for corpus in data.validation)
        # A sample has one extra token, the label of the last input.
        num_available = (num_tokens - 1) // training.seq_length
        num_samples = min(training.eval_samples, num_available)
        if num_samples < 1:
            return None
        sources = evaluation_sources(
            data.validation,
            num_samples,
            training.seq_length,
            training.seed,
            self.config.data_cache,
        )
        return Evaluation(
            sources,
            lambda: evaluation_batches(
                sources,
                training.micro_batch_size,
                mesh.dp_rank,
                mesh.dims.dp,
                make_batch,
            ),
        )


def batch_maker(
    config: TrainConfig, mesh: ParallelMesh, end_of_document: int | None = None
) -> BatchMaker:
    """Returns the function that turns samples into this rank's batches."""
    cut = SequenceCut(mesh.dims.cp, mesh.cp_rank)
    if not config.data.separate_documents:
        end_of_document = None
    return BatchMaker(mesh.device, cut, end_of_document, config.model.num_mtp_layers)


def build(
    config: TrainConfig, mesh: ParallelMesh, *, initialise: bool = True
) -> tuple[ParallelModel, ShardedOptimizer]:
    """Returns model and optimizer of one rank.

    Weights are drawn from the seed, or left zero for a checkpoint to fill.
    """
    model = parallelize(config, mesh)
    optimizer = ShardedOptimizer(
        config.optimizer, model.parameter_groups, sharded=config.parallel.zero == 1
    )
    if initialise:
        for parameter in model.parameters:
            optimizer.initialise(
                parameter.name, init_local(parameter, config.training.seed)
            )
        # Weights were written to the flat buffers; under ZeRO-3 the model has other memory.
        for group in model.parameter_groups:
            group.sync_model()
    return model, optimizer


def _with_initial_vocabulary(config: TrainConfig, resume_from: str | None) -> TrainConfig:
    """Returns the config with the vocabulary of the run's initial weights.

    They may come from its own checkpoint, which also has the eps of the latents' norms.
    Raises ConfigError when the config's model differs from theirs.
    """
    if resume_from is not None:
        saved = initial_model(resume_from)
        model = with_latent_eps_of(config.model, saved)
        if config.checkpoint.start_from is not None:
            model = with_vocabulary_of(model, saved)
        return config.model_copy(update={"model": model})
    if config.checkpoint.start_from is None:
        return config
    model, problems = resolve_initial_model(config.checkpoint, config.model)
    _raise_for(problems)
    return config.model_copy(update={"model": model})


def _check_tokenizer(weights_path: str | None, data: PreparedData) -> None:
    """Raises ConfigError when the data were made with another tokenizer than the weights."""
    if weights_path is None:
        return
    weights = initial_tokenizer(weights_path)
    # Published weights may come without one.
    if weights.content is None:
        return
    content = read_file(data.tokenizer_path).decode()
    difference = find_difference(weights.content, content)
    if difference is not None:
        raise ConfigError(
            f"/data/tokenizer: the data were not made with the tokenizer of {weights_path}: "
            f"{difference}; {weights.remedy}"
        )


@contextmanager
def _readable_corpora(config: TrainConfig) -> Iterator[None]:
    """Raises ConfigError with the remedy for token files that cannot be read."""
    try:
        yield
    except DamagedCorpusError as error:
        remedy = "restore it"
        if config.data_cache is not None and config.data_cache in str(error):
            remedy = "delete its folder, and the data are prepared again"
        raise ConfigError(f"/data: {error}; {remedy}") from error


def _check(config: TrainConfig, mesh: ParallelMesh) -> None:
    """Raises ConfigError when the config contradicts itself or the mesh."""
    _raise_for(check.find_problems(config, mesh.world_size))
    num_ranks = resolution.world_size(config)
    if num_ranks != mesh.world_size:
        raise ConfigError(
            f"the config needs {num_ranks} ranks, the mesh has {mesh.world_size}"
        )


def _raise_for(problems: Sequence[Problem]) -> None:
    """Raises ConfigError with all problems, if there are any."""
    if problems:
        raise ConfigError(
            "; ".join(f"{problem.pointer}: {problem.detail}" for problem in problems)
        )
