"""Follows the steps of a run that break a rule of `training.rules`.

Owns: which step is computed again, what is reported of a verdict, and which exception
follows. Must not know: the model, how numbers are computed, checkpoints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_ray.config.faults.rules import RuleConfig
from megatron_ray.config.training import TrainingConfig
from megatron_ray.reports import Report, RuleReport
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_numbers import StepNumbers
from megatron_ray.training.rules.errors import (
    RecheckError,
    RerunError,
    RollbackError,
    RuleStopError,
)
from megatron_ray.training.rules.verdicts import (
    Conclusion,
    conclude,
    describe_break,
    describe_ranks,
)


@dataclass(frozen=True)
class Recheck:
    """Whether a run can be restarted on other devices, and the step for which it was."""

    can_move: bool = False
    step: int | None = None
    """Step that broke a rule on other devices, twice; None: there is none."""
    rank: int = 0
    """Rank there that may have computed it wrongly."""
    has_moved: bool = True
    """Whether the run has other devices now than that rank had."""


class StepChecks:
    """The verdicts of one run on one rank; they are the same on all ranks.

    `suspect` returns the rank that may have computed the last step wrongly; it is called
    on all ranks.
    """

    def __init__(
        self,
        training: TrainingConfig,
        report: Callable[[Report], None],
        recheck: Recheck | None = None,
        suspect: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rules = training.rules
        self._left_out = training.skip_steps
        self._report = report
        self._recheck = recheck or Recheck()
        self._suspect = suspect
        self._again: int | None = None
        """Step that is computed for the second time."""

    def is_confirmed(self, step: int) -> bool:
        """Whether a verdict about a step is the last one, before its numbers are known."""
        if step == self._recheck.step:
            return True
        return step == self._again and not self._recheck.can_move

    def is_rerun(self, step: int) -> bool:
        """Whether a step is computed for the second time on these devices."""
        return step == self._again

    @property
    def has_moved(self) -> bool:
        """Whether the run is on other devices than those that broke a rule twice."""
        return self._recheck.step is not None and self._recheck.has_moved

    def examine(self, numbers: StepNumbers, accepted: Progress) -> RuleConfig | None:
        """Returns the rule that a step breaks, once that is certain; None for a good step.

        `accepted` is the progress before the step. Raises RerunError, RecheckError.
        """
        step = numbers.host.progress.step
        # Rejected before, it has no verdict now.
        if step in self._left_out:
            return None
        rule: RuleConfig | None = None
        if numbers.broken_rule is not None:
            rule = self._rules[numbers.broken_rule]
        recheck = self._recheck
        conclusion = conclude(
            is_broken=rule is not None,
            reruns=rule is not None and rule.rerun,
            is_second=step in (self._again, recheck.step),
            was_elsewhere=step == recheck.step and recheck.has_moved,
            # One move is enough, also where the cluster had no other node.
            can_move=recheck.can_move and step != recheck.step,
        )
        if conclusion is Conclusion.GOOD or conclusion is Conclusion.CONFIRMED:
            return rule
        text = f"step {step}"
        if rule is not None:
            text = self._describe(rule, numbers)
        match conclusion:
            case Conclusion.RERUN:
                self._again = step
                message = f"{text}; the step is computed again"
                self._announce(numbers, conclusion, message)
                raise RerunError(message, accepted)
            case Conclusion.RECHECK:
                rank = self._suspected(numbers)
                message = (
                    f"{text}, and again when computed for the second time; the step is to be "
                    f"computed on other devices than those of rank {rank}"
                )
                self._announce(numbers, conclusion, message, rank)
                raise RecheckError(message, accepted, {"step": step, "rank": rank})
            case Conclusion.TRANSIENT:
                message = (
                    f"{text} is good when computed for the second time, with a loss of "
                    f"{numbers.loss:.4g} and a gradient norm of {numbers.grad_norm:.4g}: a "
                    "transient fault of the hardware; the run goes on with the second result"
                )
                self._announce(numbers, conclusion, message)
            case _:
                rank = self._recheck.rank
                message = (
                    f"{text} is good on other devices, with a loss of {numbers.loss:.4g} and a "
                    f"gradient norm of {numbers.grad_norm:.4g}: a persistent fault of the "
                    f"device that rank {rank} had"
                )
                self._announce(numbers, conclusion, message, rank)
        return None

    def _suspected(self, numbers: StepNumbers) -> int:
        """Returns the rank that may have computed a step wrongly."""
        # Where only one rank's own numbers were wrong, there is no need to guess.
        if len(numbers.faulty_ranks) == 1:
            return numbers.faulty_ranks[0]
        return self._suspect()

    def act(self, rule: RuleConfig, numbers: StepNumbers, accepted: Progress) -> None:
        """Raises the exception that a rule's action means, after a report of it.

        RuleStopError, RollbackError; none for `skip`.
        """
        step = numbers.host.progress.step
        text = self._describe(rule, numbers)
        if rule.action == "stop":
            left_out = ",".join(map(str, sorted({*self._left_out, step})))
            message = (
                f"{text}; the weights are those of step {accepted.step}. Leave the step's "
                f"samples out with training.skip_steps=[{left_out}], lower optimizer.lr, or "
                "change the rule"
            )
            self._announce(numbers, "stop", message)
            raise RuleStopError(message, accepted)
        if rule.action == "rollback":
            facts = {
                "step": step,
                "max_step": max(0, step - rule.steps_back),
                "leave_out": min(rule.leave_out, step),
            }
            message = f"{text}; {describe_rollback(facts)}"
            self._announce(numbers, "rollback", message)
            # One step back is the state on the device.
            has_state = facts["max_step"] == accepted.step
            raise RollbackError(message, accepted, facts, has_state=has_state)

    def describe(self, numbers: StepNumbers) -> str:
        """Returns which rule a step breaks, and how."""
        assert numbers.broken_rule is not None
        return self._describe(self._rules[numbers.broken_rule], numbers)

    def _describe(self, rule: RuleConfig, numbers: StepNumbers) -> str:
        step = numbers.host.progress.step
        text = describe_break(rule, step, numbers.loss, numbers.grad_norm, numbers.limit)
        if rule.before_reduction:
            text += describe_ranks(numbers.faulty_ranks)
        return f"{text} (training.rules[{numbers.broken_rule}])"

    def _announce(
        self, numbers: StepNumbers, verdict: str, message: str, rank: int | None = None
    ) -> None:
        self._report(
            RuleReport(
                numbers.host.progress.step,
                verdict,
                numbers.loss,
                numbers.grad_norm,
                message,
                rank,
            )
        )


def describe_rollback(facts: Mapping[str, int]) -> str:
    """Returns what a rollback does, by the facts of its error."""
    left_out = f"step {facts['step']}"
    if facts["leave_out"] > 1:
        left_out = f"steps {facts['step'] - facts['leave_out'] + 1} to {facts['step']}"
    return (
        f"the run goes back to step {facts['max_step']} or before and leaves out the "
        f"samples of {left_out}"
    )
