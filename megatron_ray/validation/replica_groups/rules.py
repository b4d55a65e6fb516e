"""Checks replica groups against the layout and the rest of a run.

Owns: what needs equal replicas, and so excludes groups that differ between two
synchronizations. Pure. Must not know: how anything is averaged.
"""

from collections.abc import Iterator

from megatron_ray.config.local_sgd import LocalSGDConfig
from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.optimizer_kinds import state_names
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig

_POINTER = "/parallel/local_sgd"


def local_sgd_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `parallel.local_sgd`, except of its groups' number."""
    local_sgd = config.parallel.local_sgd
    if local_sgd is None:
        return []
    problems = [
        *_moment_problems(local_sgd, config.optimizer),
        *_fragment_problems(local_sgd, config),
        *_rendezvous_problems(local_sgd, config),
    ]
    for pointer, reason, remedy in _exclusions(config):
        detail = f"{reason}; {remedy}, or leave parallel.local_sgd out"
        problems.append(Problem(pointer, "replica_groups", detail))
    return problems


def group_dp_problems(config: TrainConfig, dp: int) -> list[Problem]:
    """Returns a problem when the groups do not divide the replicas."""
    groups = config.parallel.replica_groups
    if dp % groups == 0:
        return []
    divisors = [size for size in range(2, dp + 1) if dp % size == 0]
    remedy = f"use a dp that is a multiple of {groups}"
    if divisors:
        nearest = min(divisors, key=lambda size: abs(size - groups))
        remedy = f"use {nearest} groups, or a dp that is a multiple of {groups}"
    detail = f"groups={groups} does not divide dp={dp}; {remedy}"
    return [Problem(f"{_POINTER}/groups", "groups_divide", detail)]


def _moment_problems(
    local_sgd: LocalSGDConfig, optimizer: OptimizerConfig
) -> list[Problem]:
    pointer = f"{_POINTER}/sync_moments_every"
    of_matrices = state_names(optimizer, of_matrix=True)
    names = dict.fromkeys((*state_names(optimizer, of_matrix=False), *of_matrices))
    remedy = "leave it out"
    if names:
        remedy = f"it has {', '.join(names)}"
    problems = []
    for name in local_sgd.sync_moments_every:
        if name not in names:
            detail = f"{optimizer.name} has no moment {name!r}; {remedy}"
            problems.append(Problem(f"{pointer}/{name}", "no_moments", detail))
    return problems


def _fragment_problems(local_sgd: LocalSGDConfig, config: TrainConfig) -> list[Problem]:
    fragments = local_sgd.fragments
    limits = {
        "sync_every": local_sgd.sync_every,
        "model.num_layers": config.model.num_layers,
    }
    name = min(limits, key=limits.__getitem__)
    if fragments <= limits[name]:
        return []
    detail = (
        f"fragments={fragments} is above {name}={limits[name]}: each fragment has layers of "
        f"its own and a step of its own; use at most {limits[name]}"
    )
    return [Problem(f"{_POINTER}/fragments", "fragments", detail)]


def _rendezvous_problems(
    local_sgd: LocalSGDConfig, config: TrainConfig
) -> Iterator[Problem]:
    """Yields problems of groups that are jobs of their own."""
    rendezvous = local_sgd.rendezvous
    if rendezvous is None:
        return
    pointer = f"{_POINTER}/rendezvous"
    if rendezvous.group >= local_sgd.groups:
        last = local_sgd.groups - 1
        detail = (
            f"group={rendezvous.group} is not below groups={local_sgd.groups}: groups are "
            f"numbered from 0; use one of 0 to {last}"
        )
        yield Problem(f"{pointer}/group", "group_number", detail)
    if config.parallel.dp == "auto":
        detail = (
            "dp=auto may give each job another number of replicas, and all need the same; "
            "set it to a number"
        )
        yield Problem("/parallel/dp", "rendezvous", detail)
    if config.training.known_steps is None:
        detail = "a job knows the samples of its own group only; set training.steps"
        yield Problem("/training", "rendezvous", detail)


def _exclusions(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    """Yields fields that exclude replica groups, with the reason and a remedy."""
    training = config.training
    if config.parallel.zero == 3:
        reason = "zero=3 leaves the reduction of gradients to torch, over all replicas"
        yield "/parallel/zero", reason, "use zero=1"
    optimizer = config.optimizer
    for field in ("store_param_remainders", "offload"):
        if getattr(optimizer, field):
            reason = (
                f"replica groups average fp32 weights on the device, which {field} frees"
            )
            yield f"/optimizer/{field}", reason, "leave it out"
    if training.check_replicas_every_steps is not None:
        reason = "replica groups have other weights between two synchronizations"
        yield "/training/check_replicas_every_steps", reason, "leave it out"
    if training.rules:
        reason = "rules judge steps that all replicas take together, and groups do not"
        yield "/training/rules", reason, "leave them out"
    if training.fp8 is not None and training.fp8.recipe == "delayed":
        reason = "recipe=delayed keeps scales that would differ between replica groups"
        yield "/training/fp8/recipe", reason, "use recipe=current"
    moe = config.model.moe
    if moe is not None and moe.expert_bias:
        reason = "expert_bias follows the tokens of all replicas, and groups have their own"
        yield "/model/moe/expert_bias", reason, "balance by an auxiliary loss"
    if config.callbacks.unigram is not None:
        reason = "unigram counts the tokens of all replicas, and groups take other steps"
        yield "/callbacks/unigram", reason, "leave it out"
    if config.callbacks.installed:
        reason = "installed callbacks expect replicas with equal weights"
        yield "/callbacks/installed", reason, "leave them out"


def local_sgd_warnings(config: TrainConfig) -> list[Problem]:
    """Returns groups that are never synchronized before the last step."""
    local_sgd = config.parallel.local_sgd
    if local_sgd is None or local_sgd.sync_every <= config.training.num_steps:
        return []
    detail = (
        f"sync_every={local_sgd.sync_every} is beyond training.steps="
        f"{config.training.num_steps}: groups are synchronized after the last step only; "
        "lower it"
    )
    return [Problem(f"{_POINTER}/sync_every", "beyond_the_run", detail)]
