"""Trains with the rules of `training.rules`.

Owns: what a run does when its loop has left off at a step that breaks a rule. Must not
know: the verdicts, Ray.
"""

from collections import deque
from collections.abc import Callable

from megatron_ray.commands import Command
from megatron_ray.distributed import collectives
from megatron_ray.optimizer.step_rules import StepRules
from megatron_ray.reports import Report
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import Outcome, train
from megatron_ray.training.profiling.profiler import Profiler
from megatron_ray.training.progress import Progress
from megatron_ray.training.rules.checks import Recheck, StepChecks
from megatron_ray.training.rules.errors import RerunError, RuleError
from megatron_ray.training.rules.verdicts import suspect_rank


def train_by_rules(
    components: TrainingComponents,
    progress: Progress,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
    profiler: Profiler,
    recheck: Recheck,
) -> Outcome:
    """Trains as `train` does, and again from the step that is to be computed again.

    Saves the state before a step that breaks a rule, where it is there, before it raises
    the RuleError.
    """
    rules = components.optimizer.rules
    if rules is None:
        return train(components, progress, report, poll, profiler)
    first_step = progress.step
    checks = StepChecks(
        components.config.training, report, recheck, lambda: _suspect(components, rules)
    )
    commands = _KeptCommands(poll)
    while True:
        try:
            return train(components, progress, report, commands.poll, profiler, checks)
        except RerunError as rerun:
            # The device has left out the step and those after it, so its state is still
            # that before the step.
            progress = rerun.progress
            commands.keep()
            rules.resume()
        except RuleError as error:
            # What the run has begun from is in storage already.
            if error.has_state and error.progress.step > first_step:
                components.saver.save(error.progress)
            components.saver.wait()
            raise


def _suspect(components: TrainingComponents, rules: StepRules) -> int:
    """Returns the rank with the most conspicuous part of the rejected step's numbers."""
    parts = rules.rejected_part[None]
    return suspect_rank(
        collectives.all_gather_rows(parts, components.mesh.world_group).tolist()
    )


class _KeptCommands:
    """Gives commands again that were sent with steps which are computed again."""

    def __init__(self, poll: Callable[[], Command]) -> None:
        self._poll = poll
        # On GPUs one more step is under way when the numbers of a step arrive.
        self._recent: deque[Command] = deque(maxlen=2)
        self._kept = Command.CONTINUE

    def poll(self) -> Command:
        """Returns the command for this step boundary."""
        command = max(self._poll(), self._kept)
        self._kept = Command.CONTINUE
        self._recent.append(command)
        return command

    def keep(self) -> None:
        """Has the next `poll` return the strongest of the last commands."""
        self._kept = max(self._recent)
