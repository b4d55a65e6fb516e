"""Assembles a run: mesh -> model -> optimizer -> checkpoint -> data -> loop.

Owns: that order, and the ten-line API. Must not know: Ray, HTTP, the environment.

Data are prepared before (megatron_ray.data.preparation), so a session starts in
seconds. The caller owns the process groups, so several sessions can run one after
another in a process.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_ray.commands import Command, ProfileRequest
from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.datasets import build_dataset, evaluation_sources
from megatron_ray.data.indexed import DamagedCorpusError
from megatron_ray.data.loader import BatchMaker, StepLoader, evaluation_batches
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.initialization import init_local
from megatron_ray.optimizer.loss_scale import LossScaler
from megatron_ray.optimizer.replica_groups.sync import GroupPeers, SyncPeers, SyncPlan
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.optimizer.step_rules import StepRules
from megatron_ray.parallelize.parallelize import ParallelModel, parallelize
from megatron_ray.reports import PhaseReport, Report
from megatron_ray.sharding.sequence_split import SequenceCut
from megatron_ray.training.callbacks.assembly import make_callbacks
from megatron_ray.training.callbacks.protocol import CallbackContext
from megatron_ray.training.components import (
    Copier,
    Exchange,
    NoCopies,
    NoExchange,
    TrainingComponents,
)
from megatron_ray.training.evaluate import Evaluation
from megatron_ray.training.exits import with_time_limit
from megatron_ray.training.loop import Outcome
from megatron_ray.training.origin import RunOrigin, raise_for
from megatron_ray.training.profiling.out_of_memory import explained_out_of_memory
from megatron_ray.training.profiling.profiler import ProfileSource, StepProfiler
from megatron_ray.training.progress import Progress
from megatron_ray.training.replica_jobs.exchange import JobExchange
from megatron_ray.training.replica_jobs.peers import JobPeers
from megatron_ray.training.rules.checks import Recheck
from megatron_ray.training.rules.errors import RuleError
from megatron_ray.training.rules.run import train_by_rules
from megatron_ray.training.saving import Extras, TrainingSaver
from megatron_ray.training.state_copy import (
    CopyStore,
    StateCopier,
    StateCopy,
    load_copy,
)
from megatron_ray.validation import check, resolution


def discard_report(_: Report) -> None:
    """Ignores a report."""


def no_command() -> Command:
    """Returns no command to the loop."""
    return Command.CONTINUE


def no_profile() -> ProfileRequest | None:
    """Returns no request to the loop."""
    return None


class TrainingSession:
    """Runs a resolved config on one rank.

    `report` gets a StepReport per step, EvalReports, a CheckpointReport when this
    rank's part of a checkpoint is durable (from the writer's thread) and PhaseReports
    of the start-up. `poll` is called once a step on every rank and must return at once.
    `resume_from` is the path of a committed checkpoint, of any layout; without it the
    run begins with checkpoint.start_from, or with weights drawn from the seed. `copies`
    gets copies of the state for checkpoint.peer_every_steps; a run continues from a copy
    that it restores, not from `resume_from`. `peers` are this rank's in the other jobs of
    its run, for parallel.local_sgd.rendezvous.

    Raises ConfigError when the config contradicts the mesh, the data, the weights it
    begins with or the checkpoint that it resumes from, and RankOutOfMemoryError.
    """

    def __init__(  # noqa: PLR0913 - keywords, each with a default
        self,
        config: TrainConfig,
        mesh: ParallelMesh,
        data: PreparedData,
        *,
        report: Callable[[Report], None] = discard_report,
        poll: Callable[[], Command] = no_command,
        attempt: int = 1,
        resume_from: str | None = None,
        copies: CopyStore | None = None,
        peers: JobPeers | None = None,
    ) -> None:
        resolved = resolution.resolve(config, mesh.world_size)
        resolved = resolution.with_length(resolved, data.num_train_tokens)
        _check(resolved, mesh)
        origin = RunOrigin(resolved.checkpoint.start_from, resume_from, _restored(copies))
        resolved = origin.with_model(resolved)
        # Checked after preparation, because a BPE trained on little text may have fewer
        # tokens than requested.
        self.config = resolution.with_vocabulary(resolved, data.vocab_size, data.rows)
        origin.check_tokenizer(data)
        self.mesh = mesh
        self._report = report
        if peers is not None:
            poll = peers.poll
        self._poll = with_time_limit(poll, resolved.training.max_duration_s, mesh.rank)
        self._phase_start = time.monotonic()
        # Not use_deterministic_algorithms, which imports the compiler and takes a second.
        torch.set_deterministic_debug_mode(
            "error" if self.config.training.deterministic else "default"
        )
        torch.backends.cudnn.deterministic = self.config.training.deterministic
        torch.manual_seed(self.config.training.seed)
        is_same_order = origin.check_changes(self.config, data)
        with explained_out_of_memory(self.config, mesh, attempt):
            self.model, self.optimizer = build(
                self.config, mesh, peers, initialise=not origin.has_weights
            )
        self._callbacks = make_callbacks(
            CallbackContext(self.config, mesh, self.model, self.optimizer)
        )
        self._end_phase("model")
        self._saver = self._make_saver(data, attempt, origin)
        progress = origin.load(
            self.model,
            self.optimizer,
            self._callbacks.state(),
            mesh.rank,
            self.config.training.seed,
        )
        self.progress = progress.planned_for(
            self.config.training.num_steps,
            self.config.training.batch_sizes,
            is_same_order=is_same_order,
        )
        copier = self._make_copier(copies)
        self._attempt = attempt
        self._end_phase("load" if origin.has_weights else "saver")
        with _readable_corpora(self.config):
            self._components = TrainingComponents(
                self.config,
                mesh,
                self.model,
                self.optimizer,
                self._loader(data),
                self._evaluation(data),
                self._saver,
                copier,
                self._callbacks,
                self._exchange(peers),
            )
        self._end_phase("data")

    def run(
        self, profiles: ProfileSource = no_profile, recheck: Recheck | None = None
    ) -> Outcome:
        """Trains to the end, to an agreed stop or to a limit of the config.

        `profiles` is called once a step, too, and returns the newest request of a profile on
        this rank; a ProfileReport follows. `recheck` is the step that rules have rejected on
        other devices. The last checkpoint is durable when it returns. Raises
        NonFiniteLossError, RankOutOfMemoryError, and RuleError, before which checkpoints
        are durable too.
        """
        profiler = self._make_profiler(profiles)
        try:
            with explained_out_of_memory(self.config, self.mesh, self._attempt):
                # Waits for the other jobs of the run, if any.
                self.progress = self._components.exchange.join(self.progress)
                outcome = train_by_rules(
                    self._components,
                    self.progress,
                    self._report,
                    self._poll,
                    profiler,
                    recheck or Recheck(),
                )
        except RuleError:
            self._saver.close()
            raise
        except BaseException:
            # A rank that has lost its peers must be able to restart without waiting for
            # slow storage.
            self._saver.abandon()
            profiler.discard()
            raise
        finally:
            # The process groups may be closed next.
            self._components.passes.release()
        profiler.close()
        self._saver.close()
        return outcome

    def _make_profiler(self, source: ProfileSource) -> StepProfiler:
        storage = self.config.storage
        assert storage is not None  # checkpoints need one, too
        profile = self.config.training.profile
        planned = None
        if profile is not None and self.mesh.rank in profile.ranks:
            planned = ProfileRequest(*profile.first_and_last)
        # Not again after a resume.
        if planned is not None and planned.first_step <= self.progress.step:
            planned = None
        return StepProfiler(
            storage.path,
            self._attempt,
            self.mesh,
            report=self._report,
            source=source,
            planned=planned,
        )

    def _make_saver(
        self, data: PreparedData, attempt: int, origin: RunOrigin
    ) -> TrainingSaver:
        published: Mapping[str, bytes] = {}
        if self.mesh.rank == 0:
            published = origin.published()
        return TrainingSaver(
            self.config,
            self.mesh,
            self.model,
            self.optimizer,
            data,
            attempt=attempt,
            report=self._report,
            extras=Extras(published, self._callbacks),
        )

    def _make_copier(self, copies: CopyStore | None) -> Copier:
        """Returns what copies this rank's state; nothing does without a store."""
        every_steps = self.config.checkpoint.peer_every_steps
        if copies is None or every_steps is None:
            return NoCopies()
        return StateCopier(
            every_steps, self._saver, copies, self.mesh.device, self.progress
        )

    def _exchange(self, peers: JobPeers | None) -> Exchange:
        """Returns what exchanges this rank's state with other jobs."""
        if peers is None:
            return NoExchange()

        def load(copy: StateCopy) -> Progress:
            return load_copy(copy, self.model, self.optimizer, self._callbacks.state())

        return JobExchange(peers, self.mesh, self._saver, load)

    def _end_phase(self, name: str) -> None:
        now = time.monotonic()
        self._report(PhaseReport(name, now - self._phase_start))
        self._phase_start = now

    def _loader(self, data: PreparedData) -> StepLoader:
        training = self.config.training
        mesh = self.mesh
        # Samples of the whole run, also after a resume, because their order is drawn at
        # once.
        jobs = self.config.parallel.jobs
        *earlier, num_samples = [each * jobs for each in self.progress.planned_samples]
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
            training.rampup_batch_size,
            (self.config.parallel.job_index, jobs),
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


def _restored(copies: CopyStore | None) -> StateCopy | None:
    if copies is None:
        return None
    return copies.restored


def batch_maker(
    config: TrainConfig, mesh: ParallelMesh, end_of_document: int | None = None
) -> BatchMaker:
    """Returns the function that turns samples into this rank's batches."""
    cut = SequenceCut(mesh.dims.cp, mesh.cp_rank)
    if not config.data.separate_documents:
        end_of_document = None
    return BatchMaker(mesh.device, cut, end_of_document, config.model.num_mtp_layers)


def build(
    config: TrainConfig,
    mesh: ParallelMesh,
    peers: SyncPeers | None = None,
    *,
    initialise: bool = True,
) -> tuple[ParallelModel, ShardedOptimizer]:
    """Returns model and optimizer of one rank.

    Replica groups synchronize with `peers`, by default those of the mesh. Weights are drawn
    from the seed, or left zero for a checkpoint to fill.
    """
    model = parallelize(config, mesh)
    loss_scaler: LossScaler | None = None
    if config.training.scaling is not None:
        loss_scaler = LossScaler(config.training, mesh.device)
        model.scale_losses(loss_scaler.factor)
    rules: StepRules | None = None
    if config.training.rules:
        rules = StepRules(config.training, mesh.device)
    sync: SyncPlan | None = None
    if config.parallel.local_sgd is not None:
        sync = SyncPlan(
            config.parallel.local_sgd,
            config.training.num_steps,
            peers or GroupPeers(mesh.sync_group),
        )
    optimizer = ShardedOptimizer(
        config.optimizer,
        model.parameter_groups,
        sharded=config.parallel.zero == 1,
        loss_scaler=loss_scaler,
        rules=rules,
        sync=sync,
    )
    if initialise:
        for parameter in model.parameters:
            optimizer.initialise(
                parameter.name, init_local(parameter, config.training.seed)
            )
        # Weights were written to the flat buffers; under ZeRO-3 the model has other memory.
        for group in model.parameter_groups:
            group.sync_model()
        optimizer.begin()
    return model, optimizer


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
    raise_for(check.find_problems(config, mesh.world_size))
    num_ranks = resolution.world_size(config)
    if num_ranks != mesh.world_size:
        raise ConfigError(
            f"the config needs {num_ranks} ranks, the mesh has {mesh.world_size}"
        )
