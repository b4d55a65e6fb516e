"""Reports the steps of a run and raises an error for non-finite numbers.

Owns: the contents of a step's report. Must not know: commands, readers of reports.
"""

from collections.abc import Callable
from math import isfinite

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import TrainingConfig
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.planning.flops import flops_per_token
from megatron_ray.reports import MonitorReport, Report, SkippedStepReport, StepReport
from megatron_ray.training.progress import Progress, SkippedSteps
from megatron_ray.training.reporting.step_numbers import StepNumbers
from megatron_ray.training.rules.checks import StepChecks
from megatron_ray.training.rules.errors import RuleStopError


class NonFiniteLossError(MegatronRayError):
    """The loss or the gradient norm of a step is not finite, and it may not be skipped.

    Every rank raises it at the same step.
    """

    failure_kind = ErrorKind.NUMERICS

    def __init__(
        self, report: StepReport, skipped: SkippedSteps, training: TrainingConfig
    ) -> None:
        # Steps that are left out already stay so.
        left_out = ",".join(map(str, [*training.skip_steps, report.step]))
        at_scale = ""
        remedy = ""
        if report.loss_scale is not None:
            at_scale = f" at a loss scale of {report.loss_scale:g}"
            remedy = _scale_remedy(report, training)
        super().__init__(
            f"the loss of step {report.step} is {report.loss} and its gradient norm "
            f"{report.grad_norm}{at_scale}{_exceeded_limit(skipped, training)}; {remedy}"
            "lower optimizer.lr, "
            "lengthen schedule.warmup_steps, leave the step's samples out with "
            f"training.skip_steps=[{left_out}], or look at the data from an earlier "
            "checkpoint on"
        )


def _scale_remedy(report: StepReport, training: TrainingConfig) -> str:
    """Returns what to do about the range of fp16, as the first of several remedies."""
    remedy = "use training.precision=bf16, which has the range of fp32, "
    is_constant = training.scaling is not None and training.scaling.constant is not None
    # The loss itself is not scaled in the forward pass.
    if is_constant and isfinite(report.loss):
        remedy += "or a smaller training.loss_scale.constant, "
    return remedy


def _exceeded_limit(skipped: SkippedSteps, training: TrainingConfig) -> str:
    """Returns which limit one more skipped step exceeds, if any may be skipped."""
    if training.max_skipped_steps == 0:
        return ""
    if skipped.total > training.max_skipped_steps:
        limit = training.max_skipped_steps
        return f", after the {limit} skipped steps of training.max_skipped_steps"
    limit = training.max_consecutive_skipped_steps
    return (
        f", after {limit} skipped steps in a row (training.max_consecutive_skipped_steps)"
    )


class StepReporter:
    """Turns the numbers of steps into reports, and counts the skipped ones.

    `progress` is that of the run before its first step here; `checks` follow the steps
    that break a rule.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: ParallelMesh,
        report: Callable[[Report], None],
        progress: Progress,
        checks: StepChecks,
    ) -> None:
        self._report = report
        self._training = config.training
        self.checks = checks
        self._accepted = progress
        """Progress of the last step that was reported."""
        self._other_losses = tuple(config.model.aux_losses)
        # MFU is tokens per second x FLOPs per token / peak of all devices; only the first
        # factor varies.
        self._mfu_per_rate = 0.0
        peak_flops = device.peak_flops(mesh.device)
        if peak_flops:
            flops = flops_per_token(config.model, config.training.seq_length)
            self._mfu_per_rate = flops / (peak_flops * mesh.world_size)

    @property
    def skipped(self) -> SkippedSteps:
        """Counts up to the last step that was reported."""
        return self._accepted.skipped

    def step(self, numbers: StepNumbers) -> None:
        """Reports one step, unless it is to be computed again.

        Raises, after the report, NonFiniteLossError when its loss or gradient norm is
        not finite and no further step may be skipped, and the errors of
        `training.rules.checks` when it breaks a rule.
        """
        before = self._accepted
        rule = self.checks.examine(numbers, before)
        is_finite = isfinite(numbers.loss) and isfinite(numbers.grad_norm)
        is_left_out = numbers.host.progress.step in self._training.skip_steps
        is_overflow = not is_left_out and not is_finite and self._lowers_scale(numbers)
        skipped = before.skipped.after_step(
            is_good=is_finite and rule is None,
            is_left_out=is_left_out,
            is_overflow=is_overflow,
        )
        self._accepted = numbers.host.progress.with_skipped(skipped)
        report = self._step_report(numbers)
        # Before the step, so that a checkpoint with its report has these too.
        if numbers.monitored:
            self._report(MonitorReport(report.step, dict(numbers.monitored)))
        self._report(report)
        if is_left_out:
            self._report_skipped(report, "its samples are left out by training.skip_steps")
        elif is_overflow:
            reason = f"its gradients overflow fp16 at a loss scale of {report.loss_scale:g}"
            self._report_skipped(report, reason)
        elif rule is not None:
            self.checks.act(rule, numbers, before)
            self._skip_by_rule(report, self.checks.describe(numbers))
        elif not is_finite:
            if self._is_beyond_limits():
                raise NonFiniteLossError(report, skipped, self._training)
            reason = f"its loss is {report.loss} and its gradient norm {report.grad_norm}"
            self._report_skipped(report, f"{reason}; {self._count()}")

    def _step_report(self, numbers: StepNumbers) -> StepReport:
        host = numbers.host
        rate = numbers.num_tokens / host.times.total_s
        return StepReport(
            step=host.progress.step,
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            lr=host.lr,
            num_tokens=int(numbers.num_tokens),
            consumed_samples=host.progress.consumed_samples,
            step_s=host.times.total_s,
            tokens_per_s=rate,
            mfu=rate * self._mfu_per_rate,
            memory_bytes=host.memory_bytes,
            split_s=host.times.parts_s,
            other_losses=dict(zip(self._other_losses, numbers.other_losses, strict=True)),
            skipped_steps=self.skipped.total + self.skipped.overflows,
            loss_scale=numbers.loss_scale,
            weight_decay=host.weight_decay,
        )

    def _skip_by_rule(self, report: StepReport, reason: str) -> None:
        """Reports a step that a rule has skipped; raises RuleStopError for one too many."""
        if self._is_beyond_limits():
            limit = _exceeded_limit(self.skipped, self._training)
            # Later steps may have changed the weights meanwhile.
            raise RuleStopError(f"{reason}{limit}", self._accepted, has_state=False)
        self._report_skipped(report, f"{reason}; {self._count()}")

    def _count(self) -> str:
        allowed = self._training.max_skipped_steps
        return f"{self.skipped.total} of at most {allowed} skipped steps"

    def _lowers_scale(self, numbers: StepNumbers) -> bool:
        """Returns whether a lower loss scale may be the cure of a step that is not finite.

        It is none for the loss, which is computed before it is scaled.
        """
        scaling = self._training.scaling
        if scaling is None or scaling.constant is not None or numbers.loss_scale is None:
            return False
        return isfinite(numbers.loss) and numbers.loss_scale > scaling.min_scale

    def _is_beyond_limits(self) -> bool:
        """Whether the last skipped step is one too many."""
        training = self._training
        return (
            self.skipped.total > training.max_skipped_steps
            or self.skipped.consecutive > training.max_consecutive_skipped_steps
        )

    def _report_skipped(self, report: StepReport, reason: str) -> None:
        message = f"step {report.step} skipped, weights unchanged: {reason}"
        self._report(SkippedStepReport(report.step, report.loss, report.grad_norm, message))

    def steps(self, numbers_of_steps: list[StepNumbers]) -> None:
        """Reports steps in their order. Raises NonFiniteLossError likewise."""
        for numbers in numbers_of_steps:
            self.step(numbers)
