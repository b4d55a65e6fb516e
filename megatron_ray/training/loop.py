"""Runs the training loop.

Owns: the order of a step and of the actions after it. Must not know: Ray, HTTP, file
formats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ray.commands import Command, votes_for
from megatron_ray.config.training import TrainingConfig
from megatron_ray.distributed.activity import PROCESS
from megatron_ray.models.batch import Batch
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.optimizer.step_rates import StepRates
from megatron_ray.optimizer.step_sums import SkipRule, StepSums
from megatron_ray.reports import Report
from megatron_ray.training.callbacks.runner import Monitored
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.evaluate import evaluate
from megatron_ray.training.profiling.profiler import NO_PROFILER, Profiler
from megatron_ray.training.progress import Progress, is_due
from megatron_ray.training.reporting.step_numbers import StepsInFlight
from megatron_ray.training.reporting.step_reporter import StepReporter
from megatron_ray.training.reporting.step_timer import StepTimer, step_timer
from megatron_ray.training.rules.checks import StepChecks
from megatron_ray.training.step import reduce_step

Outcome = Literal["finished", "stopped", "exited"]
"""`stopped`: by a command; `exited`: at a limit of the config, before the last step."""


def train(
    components: TrainingComponents,
    progress: Progress,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
    profiler: Profiler = NO_PROFILER,
    checks: StepChecks | None = None,
) -> Outcome:
    """Trains from `progress` to the last step, a limit, or until all ranks agree to stop.

    `poll` returns the newest command to this rank; it is called once per step. `checks`
    follow the steps that break a rule, see `training.rules.run`. Raises
    NonFiniteLossError.
    """
    config = components.config
    reporter = StepReporter(
        config,
        components.mesh,
        report,
        progress,
        checks or StepChecks(config.training, report),
    )
    in_flight = StepsInFlight(components.mesh.device, len(config.model.aux_losses))
    timer = step_timer(components.mesh.device)
    # One iteration is one step and its boundary. All ranks perform an action at the same
    # boundary: due times are equal on all ranks, and commands are agreed on.
    while progress.step < config.training.num_steps:
        profiler.begin_step(progress.step + 1)
        launched = _train_step(components, progress, poll, timer, reporter.checks)
        progress = progress.after_step(components.batch_sizes)
        in_flight.add(
            progress,
            launched.rates.lr,
            timer.finish(),
            launched.sums,
            launched.monitored,
            launched.rates.weight_decay,
        )
        profiler.end_step(progress.step)

        progress, command = _arrive(components, progress, reporter, in_flight, timer)
        is_last = progress.step == config.training.num_steps
        if is_due(config.training.exit_every_steps, progress):
            command = Command.EXIT

        if is_last or is_due(config.training.eval_every_steps, progress):
            _evaluate(components, progress, report, timer)
        saves = is_last or is_due(config.checkpoint.every_steps, progress)
        copies = components.copier.is_due(progress) and not is_last
        if saves or copies or command.saves:
            timer.mark("other")
            # Non-finite weights must never be saved, so the numbers of all previous steps
            # are read first, although the host waits for the device here.
            PROCESS.phase = "checkpoint"
            command = max(command, _take(components, reporter, in_flight, waits=True))
            progress = progress.with_skipped(reporter.skipped)
            _save(components, progress, saves=saves or command.saves, copies=copies)
            timer.mark("checkpoint")
        # After the last step the run has finished, so a stop command has no effect.
        if command.stops and not is_last:
            reporter.steps(in_flight.pop_all())
            components.finish()
            return "exited" if command is Command.EXIT else "stopped"
    components.finish()
    return "finished"


@dataclass(frozen=True)
class _LaunchedStep:
    """The numbers of a step, those from the device still on it."""

    sums: StepSums
    rates: StepRates
    monitored: Monitored | None


def _train_step(
    components: TrainingComponents,
    progress: Progress,
    poll: Callable[[], Command],
    timer: StepTimer,
    checks: StepChecks,
) -> _LaunchedStep:
    """Launches one step."""
    config = components.config
    callbacks = components.callbacks
    components.replicas.run(progress)
    timer.mark("other")
    PROCESS.phase = "data"
    batches = components.loader.step(progress.consumed_samples)
    timer.mark("data")
    callbacks.begin_step(progress.step + 1, batches)
    PROCESS.phase = "forward_backward"
    loss_sum = components.passes.run(batches, timer.mark)
    PROCESS.phase = "reduce"
    # Every rank votes for its received command. The votes are reduced with the step's
    # numbers, so all ranks act on the same command at the same boundary.
    sums = reduce_step(
        components.model,
        components.optimizer,
        components.mesh,
        loss_sum,
        _count_tokens(batches),
        votes_for(poll(), is_sending=components.copier.is_sending),
        _skip_rule(config.training, progress.step + 1),
        components.faults.judging(progress.step + 1, checks),
    )
    PROCESS.phase = "optimizer"
    callbacks.after_backward(sums.of_group)
    rates = components.rates.at(progress.step + 1)
    scale_and_clip(components.optimizer, sums, rates.clip_grad_norm)
    if components.rates.varies:
        components.optimizer.set_numbers(rates.peak_lr, rates.numbers)
    components.optimizer.step(rates.lr, sums.skip, progress.step + 1)
    monitored = callbacks.after_update()
    timer.mark("optimizer")
    PROCESS.phase = "reports"
    return _LaunchedStep(sums, rates, monitored)


def _skip_rule(training: TrainingConfig, step: int) -> SkipRule:
    """Returns when the step with this number leaves the model as it is."""
    if step in training.skip_steps:
        return SkipRule.ALWAYS
    scaling = training.scaling
    is_dynamic = scaling is not None and scaling.constant is None
    if training.max_skipped_steps > 0 or is_dynamic:
        return SkipRule.IF_NOT_FINITE
    return SkipRule.NEVER


def _arrive(
    components: TrainingComponents,
    progress: Progress,
    reporter: StepReporter,
    in_flight: StepsInFlight,
    timer: StepTimer,
) -> tuple[Progress, Command]:
    """Ends a step: returns where the run goes on, and the command of the steps so far.

    A job that is behind the others of its run goes on where they are.
    """
    command = Command.CONTINUE
    if components.exchange.is_due:
        command = _take(components, reporter, in_flight, waits=True)
        progress = components.exchange.exchange(progress.with_skipped(reporter.skipped))
        # The next step's time must not include the transfer.
        timer.restart()
    is_last = progress.step == components.config.training.num_steps
    return progress, max(command, _take(components, reporter, in_flight, waits=is_last))


def _save(
    components: TrainingComponents, progress: Progress, *, saves: bool, copies: bool
) -> None:
    """Saves the state to the storage, copies it to memory, or both."""
    if saves:
        components.saver.save(progress)
    if copies:
        components.copier.copy(progress)


def _evaluate(
    components: TrainingComponents,
    progress: Progress,
    report: Callable[[Report], None],
    timer: StepTimer,
) -> None:
    """Reports the loss on the validation split, if any."""
    if components.evaluation is None:
        return
    PROCESS.phase = "evaluation"
    report(
        evaluate(
            components.model,
            components.evaluation,
            components.mesh,
            step=progress.step,
            split="validation",
        )
    )
    # The next step's time must not include the evaluation.
    timer.restart()


def _take(
    components: TrainingComponents,
    reporter: StepReporter,
    in_flight: StepsInFlight,
    *,
    waits: bool,
) -> Command:
    """Reports steps whose numbers have arrived, or all; returns the command in them.

    All ranks agree on it.
    """
    steps = in_flight.pop_arrived()
    if waits:
        steps += in_flight.pop_all()
    reporter.steps(steps)
    components.copier.observe(steps)
    return max((step.command for step in steps), default=Command.CONTINUE)


def _count_tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.num_tokens for batch in batches)
