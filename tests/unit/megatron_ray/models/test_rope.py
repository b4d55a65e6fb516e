"""Stretched rotary frequencies are those of transformers, for any rotated width."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ray.config.architecture.positions import RopeScaling
from megatron_ray.models.rope import concentration, inverse_frequencies, rotary_angles

CPU = torch.device("cpu")
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "llama3.1": {
        "kind": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-short": {
        "kind": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-short": {
        "kind": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
    "yarn-deepseek": {
        "kind": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
    },
}


@pytest.mark.parametrize(("width", "theta"), [(16, 1e4), (64, 1e4), (128, 5e5)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_and_concentration_are_those_of_transformers(
    scaling: str, width: int, theta: float
) -> None:
    given = RopeScaling(**SCALINGS[scaling])
    fields = {name: value for name, value in SCALINGS[scaling].items() if name != "kind"}
    longest = int(given.factor * given.original_max_position_embeddings)
    judge = LlamaConfig(
        hidden_size=2 * width,
        num_attention_heads=2,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": given.kind, "rope_theta": theta} | fields,
    )
    expected, factor = ROPE_INIT_FUNCTIONS[given.kind](judge, "cpu")
    torch.testing.assert_close(
        inverse_frequencies(width, theta, given, CPU), expected, rtol=1e-6, atol=0
    )
    assert concentration(given) == pytest.approx(factor, rel=1e-12)
    cos, sin = rotary_angles(torch.tensor([[0, 1]]), width, theta, torch.float32, given)
    length = (cos.square() + sin.square()).sqrt()
    torch.testing.assert_close(length, torch.full_like(length, factor))


def test_without_scaling_frequencies_are_powers_of_theta() -> None:
    expected = torch.tensor([1e4 ** -(2 * pair / 8) for pair in range(4)])
    torch.testing.assert_close(inverse_frequencies(8, 1e4, None, CPU), expected)
    assert concentration(None) == 1.0
