"""Putting a run together: mesh -> model -> optimizer -> data -> checkpoint -> loop.

Owns: that order, and the ten-line API.

Must not know: Ray, HTTP, the environment. Data are prepared before
(megatron_ray.data.prepare), so a session starts in seconds; process groups are the
caller's, so a session can be ended and another begun in the same process.
"""

import time
from collections.abc import Callable, Iterable

import torch

from megatron_ray.checkpoint.initial_model import begin, initial_model
from megatron_ray.commands import Command
from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.datasets import build_dataset
from megatron_ray.data.loader import BatchMaker, StepLoader, evaluation_batches
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.initialization import init_local
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel, parallelize
from megatron_ray.reports import PhaseReport, Report
from megatron_ray.sharding.sequence_split import SequenceCut
from megatron_ray.training.loop import Outcome, Parts, Progress, train
from megatron_ray.training.saving import TrainingSaver, resume, start_from_weights
from megatron_ray.validation import check, resolution
from megatron_ray.validation.initial_weights import with_vocabulary_of


def ignore(_: Report) -> None:
    """A report that nobody wants."""


def never() -> Command:
    """A poll that asks for nothing."""
    return Command.CONTINUE


class TrainingSession:
    """One rank's run of a resolved config.

    `report` gets a StepReport per step, EvalReports, a CheckpointReport when this
    rank's part of a checkpoint is durable (from the writer's thread) and PhaseReports
    of the start-up. `poll` is asked once a step on every rank and must return at once.
    `resume_from` is the path of a committed checkpoint, of any layout; without it the
    run begins with checkpoint.start_from, or with weights drawn from the seed.

    Raises ConfigError when the config contradicts the mesh, the data or the weights it
    begins with.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: ParallelMesh,
        data: PreparedData,
        *,
        report: Callable[[Report], None] = ignore,
        poll: Callable[[], Command] = never,
        attempt: int = 1,
        resume_from: str | None = None,
    ) -> None:
        resolved = resolution.resolve(config, mesh.world_size)
        _refuse(resolved, mesh)
        resolved = _with_start(resolved, resume_from)
        start_from = resolved.checkpoint.start_from if resume_from is None else None
        # Only now: a BPE trained on little text may have fewer tokens than it was asked
        # for, which is no mistake.
        self.config = resolution.with_vocabulary(resolved, data.vocab_size)
        self.mesh = mesh
        self._report = report
        self._poll = poll
        self._phase_start = time.monotonic()
        # Not use_deterministic_algorithms: that imports the compiler, a second of every
        # start.
        torch.set_deterministic_debug_mode(
            "error" if self.config.training.deterministic else "default"
        )
        torch.manual_seed(self.config.training.seed)
        self.model, self.optimizer = build(
            self.config, mesh, initialise=resume_from is None and start_from is None
        )
        self._phase("model")
        self._saver = TrainingSaver(
            self.config,
            mesh,
            self.model,
            self.optimizer,
            data,
            attempt=attempt,
            on_written=report,
        )
        self.progress = Progress()
        if resume_from is not None:
            self.progress = resume(resume_from, self.model, self.optimizer, mesh.rank)
        elif start_from is not None:
            start_from_weights(start_from, self.model, self.optimizer)
        self._phase("load" if resume_from or start_from else "saver")
        self._parts = Parts(
            self.config,
            mesh,
            self.model,
            self.optimizer,
            self._loader(data),
            self._evaluation(data),
            self._saver,
        )
        self._phase("data")

    def run(self) -> Outcome:
        """Trains to the end or to an agreed stop; the last checkpoint is durable when
        it returns.
        """
        try:
            outcome = train(self._parts, self.progress, self._report, self._poll)
        except BaseException:
            # a rank that has lost its peers must not wait for slow storage before it
            # can begin again
            self._saver.abandon()
            raise
        self._saver.close()
        return outcome

    def _phase(self, name: str) -> None:
        now = time.monotonic()
        self._report(PhaseReport(name, now - self._phase_start))
        self._phase_start = now

    def _loader(self, data: PreparedData) -> StepLoader:
        training = self.config.training
        mesh = self.mesh
        make_batch = batch_maker(self.config, self.mesh, data.end_of_document)
        needed = training.steps * training.global_batch_size
        dataset = build_dataset(
            data.train, needed, training.seq_length, training.seed, self.config.data_cache
        )
        return StepLoader(
            dataset,
            training.micro_batch_size,
            training.global_batch_size,
            mesh.dp_rank,
            mesh.dims.dp,
            make_batch,
        )

    def _evaluation(self, data: PreparedData) -> Callable[[], Iterable[Batch]] | None:
        training = self.config.training
        mesh = self.mesh
        make_batch = batch_maker(self.config, self.mesh, data.end_of_document)
        available = (
            sum(corpus.num_tokens for corpus in data.validation) - 1
        ) // training.seq_length
        count = min(training.eval_samples, available)
        if count < 1:
            return None
        dataset = build_dataset(
            data.validation,
            count,
            training.seq_length,
            training.seed,
            self.config.data_cache,
        )
        return lambda: evaluation_batches(
            dataset,
            count,
            training.micro_batch_size,
            mesh.dp_rank,
            mesh.dims.dp,
            make_batch,
        )


def batch_maker(
    config: TrainConfig, mesh: ParallelMesh, end_of_document: int | None = None
) -> BatchMaker:
    """How this rank turns samples into batches."""
    cut = SequenceCut(mesh.dims.cp, mesh.cp_rank)
    end = end_of_document if config.data.separate_documents else None
    return BatchMaker(mesh.device, cut, end, config.model.num_mtp_layers)


def build(
    config: TrainConfig, mesh: ParallelMesh, *, initialise: bool = True
) -> tuple[ParallelModel, ShardedOptimizer]:
    """Model and optimizer of one rank; weights are drawn from the seed, or left zero
    for a checkpoint to fill.
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
        for family in model.parameter_groups:
            family.sync_model()
    return model, optimizer


def _with_start(config: TrainConfig, resume_from: str | None) -> TrainConfig:
    """The config with the vocabulary of the weights that the run begins with, which may
    be its own checkpoint's. Raises ConfigError where its model is another one than
    theirs.
    """
    if config.checkpoint.start_from is None:
        return config
    if resume_from is not None:
        return config.model_copy(
            update={"model": with_vocabulary_of(config.model, initial_model(resume_from))}
        )
    model, problems = begin(config.checkpoint, config.model)
    if problems:
        raise ConfigError(
            "; ".join(f"{problem.pointer}: {problem.detail}" for problem in problems)
        )
    return config.model_copy(update={"model": model})


def _refuse(config: TrainConfig, mesh: ParallelMesh) -> None:
    problems = check.find_problems(config, mesh.world_size)
    if problems:
        raise ConfigError(
            "; ".join(f"{problem.pointer}: {problem.detail}" for problem in problems)
        )
    if resolution.world_size(config) != mesh.world_size:
        raise ConfigError(
            f"the config wants {resolution.world_size(config)} ranks, the mesh has "
            f"{mesh.world_size}"
        )
