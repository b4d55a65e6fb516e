"""A resumed run keeps the eps of its latents' norms, which earlier specs did not name."""

import pytest

from megatron_ray.checkpoint.train_state import saved_model
from megatron_ray.config.model import ModelConfig
from megatron_ray.validation.initial_weights import with_latent_eps_of


def latent(**mla: float) -> ModelConfig:
    return ModelConfig.model_validate(
        {"preset": "moonlight-16b", "norm_eps": 1e-4, "mla": mla}
    )


@pytest.mark.parametrize(
    ("run", "checkpoint", "resumed"),
    [(1e-6, 1e-4, 1e-4), (1e-3, 1e-4, 1e-3), (1e-6, 1e-6, 1e-6)],
    ids=["not given", "chosen", "same"],
)
def test_a_resumed_run_has_the_eps_of_its_checkpoint(
    run: float, checkpoint: float, resumed: float
) -> None:
    model = with_latent_eps_of(latent(norm_eps=run), latent(norm_eps=checkpoint))
    assert model == latent(norm_eps=resumed)
    plain = ModelConfig.model_validate({"preset": "gpt-tiny"})
    assert with_latent_eps_of(plain, latent()) == plain


def test_a_checkpoint_of_an_earlier_version_has_one_eps_for_all_norms() -> None:
    values = latent().model_dump(mode="json")
    assert saved_model("x", {"config": {"model": values}}) == latent()
    del values["mla"]["norm_eps"]
    assert saved_model("x", {"config": {"model": values}}) == latent(norm_eps=1e-4)
