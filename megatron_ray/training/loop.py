"""The training loop, on one page.

Owns: the order of a step and what is due after it. Must not know: Ray, HTTP, files'
layout.

Numbers of a step are read when they are there: at once on CPU, one step later on CUDA,
so that the device's queue never runs empty. Ranks agree on commands through the step's
own small reduction, and act on them at the same boundary.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Literal, Protocol

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.models.batch import Batch
from megatron_ray.optimizer.finalize_grads import StepStats, finalize_grads, scale_and_clip
from megatron_ray.optimizer.lr_schedule import learning_rate
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.planning.flops import flops_per_token
from megatron_ray.reports import Report, StepReport
from megatron_ray.training.evaluate import evaluate
from megatron_ray.training.step import StepTimer, forward_backward, read_later

Outcome = Literal["finished", "stopped"]


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    step: int = 0
    consumed_samples: int = 0


class NonFiniteLossError(MegatronRayError):
    """Loss or gradient norm of a step is no number; every rank raises it at the same
    step.

    Going on would only repeat it.
    """

    failure_kind = ErrorKind.NUMERICS

    def __init__(self, report: StepReport) -> None:
        found = (
            f"the loss of step {report.step} is {report.loss} and its gradient norm "
            f"{report.grad_norm}"
        )
        super().__init__(
            f"{found}; lower optimizer.lr, lengthen schedule.warmup_steps or look at the "
            "data from an earlier checkpoint on"
        )


class Saver(Protocol):
    """Writes checkpoints; see training.saving."""

    def save(self, progress: Progress) -> None: ...

    def wait(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """Everything the loop works with."""

    config: TrainConfig
    mesh: ParallelMesh
    model: ParallelModel
    optimizer: ShardedOptimizer
    loader: StepLoader
    evaluation: Callable[[], Iterable[Batch]] | None
    """Batches of the validation split, anew for each evaluation; None: there is no such
    split."""
    saver: Saver


def train(
    parts: Parts,
    progress: Progress,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
) -> Outcome:
    """Runs from `progress` to the last step, or to the boundary at which all ranks have
    agreed to stop. Raises NonFiniteLossError.
    """
    config = parts.config
    optimizer = parts.optimizer
    reading = _Reading(parts, report)
    while progress.step < config.training.steps:
        timer = reading.timer
        batches = parts.loader.step(progress.consumed_samples)
        timer.mark("data")
        loss_sum = forward_backward(parts.model, parts.mesh, batches)
        timer.mark("forward_backward")
        tokens = sum(batch.num_tokens for batch in batches)
        stats = finalize_grads(
            parts.model, optimizer, parts.mesh, loss_sum, tokens, _flags(poll())
        )
        timer.mark("reduce")
        lr = learning_rate(
            progress.step + 1, config.optimizer, config.schedule, config.training.steps
        )
        scale_and_clip(optimizer, stats, config.optimizer.clip_grad_norm)
        optimizer.step(lr)
        timer.mark("optimizer")
        progress = Progress(
            progress.step + 1, progress.consumed_samples + config.training.global_batch_size
        )
        last = progress.step == config.training.steps
        command = reading.add(progress, stats, lr, drain=last)
        if _evaluation_due(config, progress) and parts.evaluation is not None:
            report(
                evaluate(
                    parts.model,
                    parts.evaluation(),
                    parts.mesh,
                    step=progress.step,
                    split="validation",
                )
            )
            reading.timer.restart()
        if _save_due(config, progress) or command in (
            Command.CHECKPOINT,
            Command.CHECKPOINT_AND_STOP,
        ):
            command = max(
                command, reading.drain()
            )  # weights that are no numbers any more are never saved
            parts.saver.save(progress)
        if command >= Command.STOP and not last:
            reading.drain()
            parts.saver.wait()
            return "stopped"
    parts.saver.wait()
    return "finished"


def _flags(command: Command) -> list[float]:
    return [float(command == wanted) for wanted in list(Command)[1:]]


def _evaluation_due(config: TrainConfig, progress: Progress) -> bool:
    every = config.training.eval_every_steps
    return progress.step == config.training.steps or bool(
        every and progress.step % every == 0
    )


def _save_due(config: TrainConfig, progress: Progress) -> bool:
    every = config.checkpoint.every_steps
    return progress.step == config.training.steps or bool(
        every and progress.step % every == 0
    )


class _Reading:
    """Turns device numbers into reports, `lag` steps late."""

    def __init__(self, parts: Parts, report: Callable[[Report], None]) -> None:
        self._config = parts.config
        self._device = parts.mesh.device
        self._report = report
        self._attached = tuple(parts.config.model.aux_losses)
        self._lag = 1 if self._device.type == "cuda" else 0
        peak = device.peak_flops(self._device)
        flops = flops_per_token(self._config.model, self._config.training.seq_length)
        self._mfu_per_rate = flops / (peak * parts.mesh.world_size) if peak else 0.0
        self._waiting: deque[tuple[StepReport, Callable[[], list[float]]]] = deque()
        self.timer = StepTimer()

    def add(
        self, progress: Progress, stats: StepStats, lr: float, *, drain: bool
    ) -> Command:
        """Queues a step, reports those that are due and returns the strongest command
        that they agreed on.
        """
        seconds, split = self.timer.finish()
        memory = device.peak_memory_bytes(self._device)
        blank = StepReport(
            progress.step,
            0.0,
            0.0,
            lr,
            0,
            progress.consumed_samples,
            seconds,
            0.0,
            0.0,
            memory,
            split,
        )
        self._waiting.append((blank, read_later(stats.values)))
        return self.drain(keep=0 if drain else self._lag)

    def drain(self, keep: int = 0) -> Command:
        """Reports everything that waits but the newest `keep`; the strongest command
        among them.

        Raises NonFiniteLossError.
        """
        return max(
            [self._emit() for _ in range(len(self._waiting) - keep)],
            default=Command.CONTINUE,
        )

    def _emit(self) -> Command:
        blank, read = self._waiting.popleft()
        loss_sum, tokens, squared_norm, *rest = read()
        attached = rest[: len(self._attached)]
        flags = rest[len(self._attached) :]
        rate = tokens / blank.step_s
        step = replace(
            blank,
            loss=loss_sum / max(tokens, 1.0),
            grad_norm=sqrt(squared_norm) / max(tokens, 1.0),
            num_tokens=int(tokens),
            tokens_per_s=rate,
            mfu=rate * self._mfu_per_rate,
            other_losses={
                kind: value / max(tokens, 1.0)
                for kind, value in zip(self._attached, attached, strict=True)
            },
        )
        self._report(step)
        if not (isfinite(step.loss) and isfinite(step.grad_norm)):
            raise NonFiniteLossError(step)
        asked = [
            command
            for command, count in zip(list(Command)[1:], flags, strict=True)
            if count
        ]
        return max(asked, default=Command.CONTINUE)
