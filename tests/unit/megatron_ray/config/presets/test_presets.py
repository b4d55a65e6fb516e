"""Named shapes have as many parameters as their authors publish."""

import pytest

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.presets.presets import PRESETS
from megatron_ray.sharding.parameters import logical_parameters

PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "deepseek-v2-lite": 15_706_484_224,
    "moonlight-16b": 15_960_108_544,
    "deepseek-v3": 671_026_404_352 + 11_610_067_968,
}
"""Numbers of parameters, shared ones counted once, as the model cards' safetensors count
them. Biases of routers are not counted; DeepSeek-V3's are those of the model and of its
MTP layer."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_parameters(preset: str) -> None:
    model = ModelConfig.model_validate({"preset": preset})
    assert (
        sum(parameter.num_elements for parameter in logical_parameters(model))
        == PUBLISHED[preset]
    )


def test_every_preset_but_the_tiny_ones_is_counted() -> None:
    assert PRESETS.keys() - PUBLISHED.keys() == {
        name for name in PRESETS if name.endswith("-tiny")
    }


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-tiny")])
def test_tiny_presets_divide_by_four(preset: str) -> None:
    model = ModelConfig.model_validate({"preset": preset})
    assert model.num_layers % 4 == model.num_attention_heads % 4 == model.kv_heads % 4 == 0
    assert model.vocab_size is None


def test_fields_inside_a_part_of_a_preset_are_given_one_by_one() -> None:
    plain = ModelConfig.model_validate({"preset": "deepseek-tiny"})
    model = ModelConfig.model_validate(
        {"preset": "deepseek-tiny", "moe": {"z_loss_coeff": 1e-3}, "mla": {"v_head_dim": 8}}
    )
    assert plain.moe is not None
    assert plain.mla is not None
    assert model.moe is not None
    assert model.mla is not None
    assert model.moe == plain.moe.model_copy(update={"z_loss_coeff": 1e-3}) != plain.moe
    assert model.mla == plain.mla.model_copy(update={"v_head_dim": 8}) != plain.mla
    assert ModelConfig.model_validate(model.model_dump()) == model
    assert ModelConfig.model_validate({"preset": "moe-tiny", "moe": None}).moe is None
