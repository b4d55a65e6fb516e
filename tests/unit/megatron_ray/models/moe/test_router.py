"""The router's maths against plain loops in float64."""

from math import ceil, exp, log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ray.config.architecture.moe import LayerPattern, MoEConfig
from megatron_ray.expert_parallel.layers import ExpertBias, update_expert_biases
from megatron_ray.models.aux_loss import AuxLoss
from megatron_ray.models.moe import router

TOKENS = 24
EXPERTS = 8
LOGITS = np.random.default_rng(5).normal(0, 1.5, (TOKENS, EXPERTS))
BIAS = np.linspace(-0.4, 0.4, EXPERTS)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.array([exp(value - max(values)) for value in values])
    shares: np.ndarray = powers / powers.sum()
    return shares


def sigmoid(values: np.ndarray) -> np.ndarray:
    scores: np.ndarray = 1 / (1 + np.exp(-values))
    return scores


SCORES = {"softmax": softmax, "sigmoid": sigmoid}


def expected_choice(
    moe: MoEConfig, logits: np.ndarray, bias: np.ndarray | None
) -> dict[int, float]:
    """Expert -> weight of one token."""
    scores = SCORES[moe.score_function](logits)
    ranking = scores + (0 if bias is None else bias)
    allowed = set(range(EXPERTS))
    if moe.num_groups is not None and moe.group_top_k is not None:
        size = EXPERTS // moe.num_groups
        groups = [
            list(range(group * size, (group + 1) * size)) for group in range(moe.num_groups)
        ]
        best = moe.top_k // moe.group_top_k
        groups.sort(
            key=lambda members: (
                -sum(sorted((ranking[expert] for expert in members), reverse=True)[:best])
            )
        )
        allowed = {expert for members in groups[: moe.group_top_k] for expert in members}
    chosen = sorted(allowed, key=lambda expert: -ranking[expert])[: moe.top_k]
    weights = scores[chosen]
    if moe.score_function == "softmax" and not moe.pre_softmax:
        weights = softmax(logits[chosen])
    if moe.score_function == "sigmoid" and moe.top_k > 1:
        weights = weights / weights.sum()
    return {
        expert: float(weight) * moe.scaling_factor
        for expert, weight in zip(chosen, weights, strict=True)
    }


@pytest.mark.parametrize(
    ("fields", "bias"),
    [
        ({}, None),
        ({"top_k": 3, "scaling_factor": 2.5}, None),
        ({"pre_softmax": True}, None),
        ({"pre_softmax": True, "top_k": 1}, None),
        ({"score_function": "sigmoid", "top_k": 1}, None),
        ({"score_function": "sigmoid", "top_k": 4, "scaling_factor": 2.5}, None),
        ({"score_function": "sigmoid", "top_k": 2}, BIAS),
        (
            {"score_function": "sigmoid", "top_k": 4, "num_groups": 4, "group_top_k": 2},
            BIAS,
        ),
        ({"pre_softmax": True, "top_k": 4, "num_groups": 4, "group_top_k": 2}, None),
    ],
)
def test_experts_and_weights(fields: dict[str, Any], bias: np.ndarray | None) -> None:
    moe = MoEConfig(num_experts=EXPERTS, **fields)
    experts, weights = router.choose(
        moe, torch.from_numpy(LOGITS), None if bias is None else torch.from_numpy(bias)
    )
    for logits, chosen, given in zip(
        LOGITS, experts.tolist(), weights.tolist(), strict=True
    ):
        assert dict(zip(chosen, given, strict=True)) == pytest.approx(
            expected_choice(moe, logits, bias), rel=1e-12
        )


def test_given_experts_are_taken_with_weights_of_their_own_scores() -> None:
    moe = MoEConfig(num_experts=EXPERTS, top_k=2)
    given = torch.arange(TOKENS)[:, None] % 3 + torch.tensor([0, 4])
    experts, weights = router.choose(moe, torch.from_numpy(LOGITS), replayed_TK=given)
    assert torch.equal(experts, given)
    for logits, chosen, weight in zip(
        LOGITS, given.tolist(), weights.tolist(), strict=True
    ):
        assert weight == pytest.approx(softmax(logits[chosen]), rel=1e-12)


def gradient(loss: Tensor, logits: Tensor) -> np.ndarray:
    (grad,) = torch.autograd.grad(loss, logits)
    return grad.numpy()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_the_balancing_loss_is_switch_transformers_times_the_tokens(
    score_function: Any, sequences: int
) -> None:
    moe = MoEConfig(
        num_experts=EXPERTS, top_k=2, score_function=score_function, aux_loss_coeff=0.3
    )
    logits = torch.from_numpy(LOGITS).requires_grad_()
    sequence = torch.arange(sequences).repeat_interleave(TOKENS // sequences)
    experts, _ = router.choose(moe, logits)
    counts = router.count_tokens(experts, EXPERTS, sequence, sequences)
    length = TOKENS // sequences
    scores = (
        logits.softmax(-1)
        if score_function == "softmax"
        else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    )
    total_loss = torch.zeros((), dtype=torch.float64)
    for part in range(sequences):
        rows = slice(part * length, (part + 1) * length)
        tokens = [
            sum(expert in chosen for chosen in experts[rows].tolist())
            for expert in range(EXPERTS)
        ]
        assert counts[part].tolist() == tokens
        total = torch.zeros((), dtype=torch.float64)
        for expert in range(EXPERTS):
            total = total + scores[rows, expert].sum() * tokens[expert]
        total_loss = total_loss + EXPERTS * 0.3 / (2 * length**2) * total
    expected = TOKENS * total_loss / sequences
    measured = router.aux_loss(moe, logits, counts.double(), sequence)
    assert float(measured.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    np.testing.assert_allclose(
        gradient(measured, logits), gradient(expected, logits), rtol=1e-10, atol=1e-14
    )


def test_the_z_loss_is_the_mean_squared_logsumexp_times_the_tokens() -> None:
    z_loss = router.z_loss(
        MoEConfig(num_experts=EXPERTS, z_loss_coeff=1e-2), torch.from_numpy(LOGITS)
    )
    squares = [log(sum(exp(logit) for logit in logits)) ** 2 for logits in LOGITS]
    assert float(z_loss) == pytest.approx(TOKENS * 1e-2 * sum(squares) / TOKENS, rel=1e-12)


def test_an_attached_loss_adds_its_gradient_and_changes_no_value() -> None:
    logits = torch.from_numpy(LOGITS).requires_grad_()
    weights = logits.softmax(-1)
    extra = logits.square().sum()
    attach = AuxLoss("extra", 2.0)
    attached = attach(weights, extra)
    assert torch.equal(attached, weights)
    along = torch.linspace(0, 1, EXPERTS, dtype=torch.float64)
    expected = gradient((weights * along).sum() + extra, logits)
    np.testing.assert_allclose(
        gradient((attach(logits.softmax(-1), logits.square().sum()) * along).sum(), logits),
        expected,
    )
    counted = attach.take()
    assert counted is not None
    assert counted.item() == pytest.approx(extra.item() / 2)
    assert attach.take() == 0


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_full_expert_keeps_the_heaviest_or_the_first(policy: Any) -> None:
    moe = MoEConfig(num_experts=EXPERTS, top_k=3, capacity_factor=0.6, drop_policy=policy)
    most = router.capacity(moe, TOKENS)
    assert most == ceil(TOKENS * 3 / EXPERTS * 0.6) == 6
    experts, weights = router.choose(moe, torch.from_numpy(LOGITS))
    kept, kept_weights = router.limit(moe, experts, weights, most)
    dropped = 0
    for expert in range(EXPERTS):
        asking = [
            (token, k)
            for token in range(TOKENS)
            for k in range(3)
            if experts[token, k] == expert
        ]
        if policy == "probs":
            asking.sort(key=lambda place: -float(weights[place]))
        for place in asking[:most]:
            assert kept[place] == expert
            assert kept_weights[place] == weights[place]
        for place in asking[most:]:
            assert kept[place] == EXPERTS
            assert kept_weights[place] == 0
            dropped += 1
    assert dropped > 5


def test_there_is_no_capacity_without_a_factor_and_never_more_than_the_tokens() -> None:
    assert router.capacity(MoEConfig(num_experts=4), 100) is None
    assert router.capacity(MoEConfig(num_experts=4, top_k=2, capacity_factor=9), 100) == 100


def test_a_bias_moves_by_the_sign_of_what_is_missing() -> None:
    bias = ExpertBias(4, rate=0.25)
    bias.count(torch.tensor([4.0, 1.0, 1.0, 2.0]))
    update_expert_biases([bias], None, None)
    assert bias.value.tolist() == [-0.25, 0.25, 0.25, 0.0]
    bias.count(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    update_expert_biases([bias], None, None)
    assert bias.value.tolist() == [0.0, 0.5, 0.5, -0.25]


def test_which_layers_have_experts() -> None:
    assert [
        MoEConfig(num_experts=2, layer_pattern=LayerPattern(every=3)).on_layer(i)
        for i in range(4)
    ] == [True, False, False, True]
    assert [
        MoEConfig(num_experts=2, layer_pattern=[0, 1]).on_layer(i) for i in range(2)
    ] == [
        False,
        True,
    ]
