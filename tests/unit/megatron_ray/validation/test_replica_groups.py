"""What replica groups exclude is refused with a reason and a remedy."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation import check, resolution
from megatron_ray.validation.resume.comparison import compare

GROUPS = {"groups": 2, "sync_every": 8}
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48}
BASE: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 256,
        "max_sequence_length": 64,
    },
    "parallel": {"dp": 4, "local_sgd": GROUPS},
    "data": {
        "train": [{"path": "builtin://python-stdlib"}],
        "tokenizer": {"kind": "bytes"},
    },
    "training": {
        "seq_length": 64,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "steps": 100,
    },
    "optimizer": {"lr": 1e-3},
}


def config(**sections: dict[str, Any]) -> TrainConfig:
    fields = {name: {**BASE.get(name, {}), **section} for name, section in sections.items()}
    return TrainConfig.from_mapping({**BASE, **fields})


def in_groups(**fields: Any) -> dict[str, Any]:
    return {"parallel": {"dp": 4, "local_sgd": {**GROUPS, **fields}}}


def job(**fields: Any) -> dict[str, Any]:
    """The groups as jobs of their own."""
    meeting = {"path": "/shared/meeting", "group": 1, **fields}
    return in_groups(rendezvous=meeting)


OR_NONE = ", or leave parallel.local_sgd out"


@pytest.mark.parametrize(
    ("sections", "pointer", "words"),
    [
        (
            in_groups(groups=3),
            "/parallel/local_sgd/groups",
            "groups=3 does not divide dp=4; use 2 groups, or a dp that is a multiple of 3",
        ),
        (
            {"parallel": {"dp": 1}},
            "/parallel/local_sgd/groups",
            "groups=2 does not divide dp=1; use a dp that is a multiple of 2",
        ),
        (
            {"parallel": {"dp": 4, "ep": 4}, "model": {"moe": MOE}},
            "/parallel/ep",
            "etp x ep = 1 x 4 must divide tp x cp x dp / groups = 1 x 1 x 4 / 2; use a dp "
            "that is a multiple of 8, or lower ep or etp",
        ),
        (
            in_groups(fragments=3),
            "/parallel/local_sgd/fragments",
            "fragments=3 is above model.num_layers=2: each fragment has layers of its own "
            "and a step of its own; use at most 2",
        ),
        (
            in_groups(sync_every=1, fragments=2),
            "/parallel/local_sgd/fragments",
            "fragments=2 is above sync_every=1: each fragment has layers of its own and a "
            "step of its own; use at most 1",
        ),
        (
            in_groups(sync_moments_every={"exp_avg": 8, "momentum": 8}),
            "/parallel/local_sgd/sync_moments_every/momentum",
            "adamw has no moment 'momentum'; it has exp_avg, exp_avg_sq",
        ),
        (
            {
                **in_groups(sync_moments_every={"momentum_buffer": 8}),
                "optimizer": {"name": "sgd", "momentum": 0},
            },
            "/parallel/local_sgd/sync_moments_every/momentum_buffer",
            "sgd has no moment 'momentum_buffer'; leave it out",
        ),
        (
            {"parallel": {"zero": 3}},
            "/parallel/zero",
            "zero=3 leaves the reduction of gradients to torch, over all replicas; use "
            f"zero=1{OR_NONE}",
        ),
        (
            {
                "training": {"precision": "bf16"},
                "optimizer": {"store_param_remainders": True},
            },
            "/optimizer/store_param_remainders",
            "replica groups average fp32 weights on the device, which "
            f"store_param_remainders frees; leave it out{OR_NONE}",
        ),
        (
            {"optimizer": {"offload": True}},
            "/optimizer/offload",
            "replica groups average fp32 weights on the device, which offload frees; leave "
            f"it out{OR_NONE}",
        ),
        (
            {"training": {"check_replicas_every_steps": 5}},
            "/training/check_replicas_every_steps",
            "replica groups have other weights between two synchronizations; leave it "
            f"out{OR_NONE}",
        ),
        (
            {"training": {"rules": [{"when": "not_finite", "action": "stop"}]}},
            "/training/rules",
            "rules judge steps that all replicas take together, and groups do not; leave "
            f"them out{OR_NONE}",
        ),
        (
            {"training": {"precision": "bf16", "fp8": {"recipe": "delayed"}}},
            "/training/fp8/recipe",
            "recipe=delayed keeps scales that would differ between replica groups; use "
            f"recipe=current{OR_NONE}",
        ),
        (
            {"model": {"moe": MOE | {"score_function": "sigmoid", "expert_bias": True}}},
            "/model/moe/expert_bias",
            "expert_bias follows the tokens of all replicas, and groups have their own; "
            f"balance by an auxiliary loss{OR_NONE}",
        ),
        (
            {"callbacks": {"unigram": {}}},
            "/callbacks/unigram",
            "unigram counts the tokens of all replicas, and groups take other steps; leave "
            f"it out{OR_NONE}",
        ),
        (
            job(group=2),
            "/parallel/local_sgd/rendezvous/group",
            "group=2 is not below groups=2: groups are numbered from 0; use one of 0 to 1",
        ),
        (
            job(path="redis://host/meeting"),
            "/parallel/local_sgd/rendezvous/path",
            "the scheme 'redis' is not supported; use a path or one of file://, s3://, "
            "gs://, gcs://",
        ),
        (
            {"parallel": {**job()["parallel"], "dp": "auto"}},
            "/parallel/dp",
            "dp=auto may give each job another number of replicas, and all need the same; "
            "set it to a number",
        ),
        (
            {**job(), "training": {"steps": None, "epochs": 1.5}},
            "/training",
            "a job knows the samples of its own group only; set training.steps",
        ),
    ],
)
def test_each_exclusion_has_one_problem(
    sections: dict[str, Any], pointer: str, words: str
) -> None:
    fields = {name: {**BASE.get(name, {}), **section} for name, section in sections.items()}
    (problem,) = check.find_problems(config(**fields))
    assert (problem.pointer, problem.detail) == (pointer, words)


def test_installed_callbacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    callbacks = settings.callbacks.model_copy(update={"installed": {"some": None}})
    (problem,) = check.find_problems(settings.model_copy(update={"callbacks": callbacks}))
    assert problem.pointer == "/callbacks/installed"
    assert problem.detail == (
        f"installed callbacks expect replicas with equal weights; leave them out{OR_NONE}"
    )


def test_groups_that_are_jobs_need_not_divide_dp() -> None:
    fields = job()
    fields["parallel"]["dp"] = 1
    settings = config(**fields)
    assert check.find_problems(settings) == []
    parallel = settings.parallel
    assert (parallel.replica_groups, parallel.sync_groups) == (1, 2)
    assert (parallel.jobs, parallel.job_index) == (2, 1)


def test_groups_that_only_meet_at_the_end_are_said() -> None:
    (warning,) = check.find_warnings(config(**in_groups(sync_every=101)))
    assert warning.pointer == "/parallel/local_sgd/sync_every"
    assert warning.detail == (
        "sync_every=101 is beyond training.steps=100: groups are synchronized after the "
        "last step only; lower it"
    )
    assert check.find_warnings(config()) == []


@pytest.mark.parametrize(("ranks", "dp"), [(3, 2), (5, 4), (9, 8), (1, 2)])
def test_auto_takes_a_number_that_the_groups_divide(ranks: int, dp: int) -> None:
    settings = config(parallel={"dp": "auto"})
    assert resolution.resolve_dp(settings, ranks) == dp
    # Experts are spread over the replicas of one group.
    experts = config(parallel={"dp": "auto", "ep": 2}, model={"moe": MOE})
    assert resolution.least_dp(experts) == 4


def test_periods_change_on_a_resume_only_where_it_is_said() -> None:
    saved = config()
    changed = config(**in_groups(sync_every=16))
    (problem,) = compare(changed, saved, "it was").problems
    assert problem.pointer == "/parallel/local_sgd/sync_every"
    assert problem.detail == (
        "16, but it was 8, and replica groups would synchronize otherwise; set it back, or "
        "add parallel.local_sgd.sync_every to checkpoint.resume_changes to go on with it"
    )
    moments = config(**in_groups(sync_moments_every={"exp_avg": 16}))
    (problem,) = compare(moments, saved, "it was").problems
    assert problem.pointer == "/parallel/local_sgd/sync_moments_every"
    assert problem.detail.startswith("{'exp_avg': 16}, but it was {}, and replica groups")
    named = {"resume_changes": ["parallel.local_sgd.sync_moments_every"]}
    allowed = moments.model_copy(update={"checkpoint": config(checkpoint=named).checkpoint})
    assert check.find_problems(allowed) == []
    assert compare(allowed, saved, "it was").problems == ()
    allowed = config(
        **in_groups(sync_every=16), checkpoint={"resume_changes": ["parallel.local_sgd"]}
    )
    assert check.find_problems(allowed) == []
    assert compare(allowed, saved, "it was").problems == ()
    assert compare(config(parallel={"dp": 8}), saved, "it was").problems == ()
