"""Finds numbers that are legal one by one and without effect together.

Owns: what a run would never do although its config asks for it. Rates are judged in
`schedule`. Pure. Must not know: how many ranks there are, the data.
"""

from collections.abc import Iterator

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def interval_warnings(config: TrainConfig) -> list[Problem]:
    """Returns intervals that are longer than the run, or that repeat nothing."""
    training = config.training
    data = config.data
    warnings = list[Problem]()
    every = training.eval_every_steps
    if every is not None and not data.validation and not data.validation_fraction:
        detail = (
            f"eval_every_steps={every}, but there is no validation data: data.validation is "
            "empty and data.validation_fraction is 0, so nothing is evaluated"
        )
        warnings.append(Problem("/training/eval_every_steps", "no_validation", detail))
    elif every is not None and every > training.num_steps:
        detail = (
            f"eval_every_steps={every} is beyond training.steps={training.num_steps}: the run is "
            "evaluated after its last step only"
        )
        warnings.append(Problem("/training/eval_every_steps", "beyond_the_run", detail))
    every = config.checkpoint.every_steps
    if every is not None and every > training.num_steps:
        detail = (
            f"every_steps={every} is beyond training.steps={training.num_steps}: the only "
            "checkpoint is that of the last step, and a failure before it loses the run"
        )
        warnings.append(Problem("/checkpoint/every_steps", "beyond_the_run", detail))
    every = training.exit_every_steps
    if every is not None and every > training.num_steps:
        detail = (
            f"exit_every_steps={every} is beyond training.steps={training.num_steps}: the run "
            "ends after its last step only"
        )
        warnings.append(Problem("/training/exit_every_steps", "beyond_the_run", detail))
    for name, every in config.callbacks.intervals.items():
        if every > training.num_steps:
            detail = (
                f"every_steps={every} is beyond training.steps={training.num_steps}: "
                "nothing is reported; lower it"
            )
            pointer = f"/callbacks/{name}/every_steps"
            warnings.append(Problem(pointer, "beyond_the_run", detail))
    return warnings


def skipping_problems(config: TrainConfig) -> list[Problem]:
    """Returns a problem when every step of the run is left out."""
    training = config.training
    # At most 1024 steps can be listed, so long runs are not enumerated.
    steps = training.known_steps
    if steps is None or len(set(training.skip_steps)) < steps:
        return []
    if not set(range(1, steps + 1)) <= set(training.skip_steps):
        return []
    detail = f"all of training.steps={steps} are left out; keep one"
    return [Problem("/training/skip_steps", "skip_all", detail)]


def skipping_warnings(config: TrainConfig) -> list[Problem]:
    """Returns steps to skip that the run does not have, and a limit that is none."""
    training = config.training
    warnings = list[Problem]()
    beyond = [step for step in training.skip_steps if step > training.num_steps]
    if beyond:
        detail = (
            f"step {beyond[0]} is beyond training.steps={training.num_steps}; steps count "
            "from 1"
        )
        warnings.append(Problem("/training/skip_steps", "beyond_the_run", detail))
    if training.max_skipped_steps >= training.num_steps:
        detail = (
            f"max_skipped_steps={training.max_skipped_steps} allows all of training.steps="
            f"{training.num_steps} to be skipped; a few are enough for rare bad batches"
        )
        warnings.append(Problem("/training/max_skipped_steps", "no_limit", detail))
    return warnings


def source_warnings(config: TrainConfig) -> list[Problem]:
    """Returns sources of the blend with a weight of less than one sample in the run."""
    sources = config.data.train
    total = sum(source.weight for source in sources)
    num_samples = config.training.batch_sizes.samples_after(config.training.num_steps)
    warnings = []
    for index, source in enumerate(sources):
        share = source.weight / total
        if share * num_samples < 1:
            detail = (
                f"weight={source.weight:g} of {total:g} in all is less than one of the run's "
                f"{num_samples} samples, so {source.path} is hardly used; raise it, or leave "
                "the source out"
            )
            pointer = f"/data/train/{index}/weight"
            warnings.append(Problem(pointer, "source_unused", detail))
    return warnings


def model_warnings(config: TrainConfig) -> list[Problem]:
    """Returns parts of the model that cost time and are never used or trained."""
    model = config.model
    warnings = []
    if model.mtp is not None and not model.mtp.loss_coeff:
        detail = (
            "loss_coeff=0 computes the MTP layers in every step and never trains them; leave "
            "model.mtp out, or raise it"
        )
        warnings.append(Problem("/model/mtp/loss_coeff", "not_trained", detail))
    every = model.full_attention_every
    if every is not None and every > model.num_layers:
        detail = (
            f"full_attention_every={every} is beyond num_layers={model.num_layers}: the "
            "sliding window applies to every layer"
        )
        warnings.append(Problem("/model/full_attention_every", "no_effect", detail))
    return warnings


def clipping_warnings(config: TrainConfig) -> list[Problem]:
    """Returns a limit of the gradient norm below which updates vanish."""
    optimizer = config.optimizer
    # SGD has no eps.
    if not 0 < optimizer.clip_grad_norm <= (optimizer.eps or 0.0):
        return []
    detail = (
        f"clip_grad_norm={optimizer.clip_grad_norm:g} is not above eps={optimizer.eps:g}, so "
        "that gradients vanish beside it and hardly change a weight; raise it, or use 0 for "
        "no clipping"
    )
    return [Problem("/optimizer/clip_grad_norm", "clip_too_small", detail)]


def decay_warnings(config: TrainConfig) -> list[Problem]:
    """Returns weight decays that turn weights to 0 or beyond in one step."""
    warnings = []
    for pointer, lr, weight_decay in _decays(config.optimizer):
        if lr * weight_decay >= 1:
            detail = (
                f"lr x weight_decay = {lr:g} x {weight_decay:g} = {lr * weight_decay:g}: a "
                "step subtracts at least the whole weight; lower one of them below a product "
                "of 1"
            )
            warnings.append(Problem(pointer, "decay_too_large", detail))
    return warnings


def _decays(optimizer: OptimizerConfig) -> Iterator[tuple[str, float, float]]:
    """Yields where a rate or a decay is set, with the largest of both."""
    lr = optimizer.lr
    weight_decay = optimizer.weight_decay
    yield "/optimizer/weight_decay", lr, weight_decay
    if optimizer.adamw_lr_scale is not None:
        yield "/optimizer/adamw_lr_scale", lr * optimizer.adamw_lr_scale, weight_decay
    for index, group in enumerate(optimizer.groups):
        own_decay = weight_decay
        if group.weight_decay is not None:
            own_decay = group.weight_decay
        yield f"/optimizer/groups/{index}", lr * (group.lr_scale or 1.0), own_decay
    schedule = optimizer.weight_decay_schedule
    if schedule is not None and schedule.end > weight_decay:
        weight_decay = schedule.end
        yield "/optimizer/weight_decay_schedule/end", lr, weight_decay
    for index, switch in enumerate(optimizer.switches):
        lr = switch.numbers.get("lr", lr)
        weight_decay = switch.numbers.get("weight_decay", weight_decay)
        yield f"/optimizer/switches/{index}", lr, weight_decay
