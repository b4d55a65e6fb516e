"""Reports the steps of a run and raises an error for non-finite numbers.

Owns: the contents of a step's report. Must not know: commands, readers of reports.
"""

from collections.abc import Callable
from math import isfinite

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.planning.flops import flops_per_token
from megatron_ray.reports import Report, StepReport
from megatron_ray.training.step_numbers import StepNumbers


class NonFiniteLossError(MegatronRayError):
    """The loss or the gradient norm of a step is not finite.

    Every rank raises it at the same step.
    """

    failure_kind = ErrorKind.NUMERICS

    def __init__(self, report: StepReport) -> None:
        super().__init__(
            f"the loss of step {report.step} is {report.loss} and its gradient norm "
            f"{report.grad_norm}; lower optimizer.lr, lengthen schedule.warmup_steps or "
            "look at the data from an earlier checkpoint on"
        )


class StepReporter:
    """Turns the numbers of steps into reports."""

    def __init__(
        self, config: TrainConfig, mesh: ParallelMesh, report: Callable[[Report], None]
    ) -> None:
        self._report = report
        self._other_losses = tuple(config.model.aux_losses)
        # MFU is tokens per second x FLOPs per token / peak of all devices; only the first
        # factor varies.
        self._mfu_per_rate = 0.0
        peak_flops = device.peak_flops(mesh.device)
        if peak_flops:
            flops = flops_per_token(config.model, config.training.seq_length)
            self._mfu_per_rate = flops / (peak_flops * mesh.world_size)

    def step(self, numbers: StepNumbers) -> None:
        """Reports one step.

        Raises NonFiniteLossError, after the report, when its loss or gradient norm is
        not finite.
        """
        host = numbers.host
        rate = numbers.num_tokens / host.times.total_s
        report = StepReport(
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
        )
        self._report(report)
        if not (isfinite(report.loss) and isfinite(report.grad_norm)):
            raise NonFiniteLossError(report)

    def steps(self, numbers_of_steps: list[StepNumbers]) -> None:
        """Reports steps in their order. Raises NonFiniteLossError likewise."""
        for numbers in numbers_of_steps:
            self.step(numbers)
