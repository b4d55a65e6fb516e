"""Transformer Engine itself computes what the local spec does, on a GPU."""

import inspect
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.parallelize.transformer_engine.library import load_transformer_engine
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.parity import (
    END,
    GPT2,
    LLAMA,
    RandomDataset,
    make_config,
    worst_relative_l2,
)
from tests.support.transformer_engine import RECORDED, signature

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        find_spec("transformer_engine_torch") is None, reason="needs transformer-engine"
    ),
]

WIDE = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 512,
}
EXPERTS = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 256}}


def config_of(
    spec: str, model: dict[str, Any], fp8: str | None, *, separate_documents: bool = False
) -> TrainConfig:
    fields = make_config(
        model | {"spec": spec},
        {"dp": 1},
        steps=1,
        precision="bf16",
        separate_documents=separate_documents,
    ).model_dump()
    if fp8 is not None:
        fields["training"]["fp8"] = {"recipe": fp8}
    return TrainConfig.from_mapping(fields)


def one_step(config: TrainConfig) -> tuple[float, dict[str, np.ndarray], torch.Tensor]:
    """Loss, gradients and then weights of a step."""
    mesh = ParallelMesh.single("cuda")
    model, optimizer = build(config, mesh)
    dataset = RandomDataset(
        config.model.vocabulary, 32, ends=0.15 if config.data.separate_documents else 0.0
    )
    loader = StepLoader(dataset, 2, 8, 0, 1, batch_maker(config, mesh, END))
    batches = loader.step(0)
    loss = forward_backward(model, mesh, batches)
    num_tokens = sum(batch.num_tokens for batch in batches)
    stats = reduce_step(model, optimizer, mesh, loss, num_tokens)
    scale_and_clip(optimizer, stats, clip_grad_norm=1.0)
    gradients = {
        name: box.tensor.float().cpu().numpy()
        for name, entry in optimizer.sharded_gradients().items()
        for box in entry.boxes
    }
    optimizer.step(config.optimizer.lr)
    weights = torch.cat(
        [group.buffers.parameters.float().cpu() for group in model.parameter_groups]
    )
    return stats.values[0].item() / num_tokens, gradients, weights


@pytest.mark.parametrize("fp8", [None, "current", "blockwise", "mxfp8"])
@pytest.mark.parametrize(
    "model",
    [LLAMA | WIDE, GPT2 | WIDE | {"num_query_groups": 4}, LLAMA | WIDE | EXPERTS],
    ids=["llama", "gpt2", "experts"],
)
def test_a_step_is_that_of_the_local_spec(model: dict[str, Any], fp8: str | None) -> None:
    device = ParallelMesh.single("cuda").device_kind
    if fp8 is not None and not device.multiplies_fp8(fp8):
        pytest.skip(f"this GPU does not multiply by {fp8}")
    assert_close(
        config_of("transformer_engine", model, fp8), config_of("local", model, fp8)
    )


@pytest.mark.parametrize("window", [None, 8])
def test_documents_are_kept_apart(window: int | None) -> None:
    model = LLAMA | WIDE | {"sliding_window": window}
    ours, local = (
        config_of(spec, model, None, separate_documents=True)
        for spec in ("transformer_engine", "local")
    )
    assert_close(ours, local)


def assert_close(ours: TrainConfig, local: TrainConfig) -> None:
    tolerance = 2e-2 if ours.training.fp8 is None else 0.1
    loss, gradients, weights = one_step(ours)
    expected_loss, expected_gradients, expected_weights = one_step(local)
    assert loss == pytest.approx(expected_loss, rel=tolerance / 4)
    # A key's bias has no gradient but rounding without rotary positions.
    kept = {name for name in gradients if not name.endswith("attention.k.bias")}
    distance, name = worst_relative_l2(
        {name: gradients[name] for name in kept},
        {name: expected_gradients[name] for name in kept},
    )
    assert distance <= tolerance, name
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=2 * 3e-3)


def test_the_installed_library_has_the_recorded_signatures() -> None:
    engine = load_transformer_engine(ParallelMesh.single("cuda").device_kind)
    for name, methods in RECORDED["pytorch"].items():
        for method, rows in methods.items():
            function = inspect.unwrap(getattr(getattr(engine.pytorch, name), method))
            _, *installed = inspect.signature(function).parameters
            assert installed == list(signature(rows).parameters), (name, method)
