"""Passes in pairs: while tokens of one are on their way to experts, the other computes."""

from typing import Any

import pytest
import torch

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.activity import PROCESS
from megatron_ray.reports import StepPart
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward
from tests.parallel.test_expert_parallel import MODELS
from tests.parallel.test_recompute import (
    DEEPSEEK,
    EXPERTS,
    SETTINGS,
    gradients,
    with_recompute,
)
from tests.support.parity import make_config, make_mesh, random_loader
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

EP2: dict[str, Any] = {"dp": 2, "ep": 2}
SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
LATENT = DEEPSEEK | {"mtp": {"num_layers": 1}, "moe": EXPERTS}
INTERLEAVED = {"pp": 2, "vpp": 2, "layout": "E|t|t|L"}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ep2": (MODELS["softmax"], EP2, {}),
    "ep2-bf16": (MODELS["shared"], EP2, {"precision": "bf16"}),
    "ep2-dropout": (MODELS["sigmoid"] | {"hidden_dropout": 0.2}, EP2, {}),
    "ep2-frozen": (MODELS["softmax"], EP2, {"freeze": ("layers.0.*", "embedding.*")}),
    "ep2-tp2-etp1": (MODELS["shared"], SP | {"dp": 1, "ep": 2, "etp": 1}, {}),
    "ep2-pp2": (LATENT, EP2 | {"pp": 2}, {}),
    "ep2-pp2-vpp2": (MODELS["sigmoid"], EP2 | INTERLEAVED, {}),
    "ep2-cp2-zero0": (MODELS["softmax"], {"dp": 1, "cp": 2, "ep": 2, "zero": 0}, {}),
    "ep2-gather": (MODELS["softmax"], EP2 | {"overlap_param_gather": True}, {}),
}


def config_of(name: str, *, overlap: bool) -> TrainConfig:
    """Four microbatches or more."""
    model, parallel, changes = LAYOUTS[name]
    precision = changes.get("precision", "fp32")
    parallel = parallel | {"ep_comm_overlap": overlap}
    config = make_config(model, parallel, steps=1, precision=precision, micro_batch=1)
    optimizer = config.optimizer.model_copy(update={"freeze": changes.get("freeze", ())})
    return config.model_copy(update={"optimizer": optimizer})


def world(config: TrainConfig) -> int:
    parallel = config.parallel
    assert parallel.dp != "auto"
    return parallel.dp * parallel.tp * parallel.pp * parallel.cp


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in ("ep2", "ep2-pp2") else [pytest.mark.parity])
        for name in LAYOUTS
    ],
)
def test_gradients_are_those_of_one_pass_after_another(layout: str) -> None:
    plain = config_of(layout, overlap=False)
    overlapped = config_of(layout, overlap=True)
    configs = [plain, overlapped]
    configs += [with_recompute(overlapped, recompute) for recompute in SETTINGS]
    for expected, *others in run_ranks(gradients, world(plain), configs, timeout_s=180):
        assert expected.any()
        for other in others:
            assert torch.equal(other, expected)


Turn = tuple[StepPart, int | None]


def turns(rank: int, world_size: int, config: TrainConfig) -> list[Turn]:
    """Passes of a step with their microbatches, an entry where each ends or is interrupted."""
    mesh = make_mesh(rank, world_size, config)
    model, _ = build(config, mesh)
    marks: list[Turn] = []

    def mark(part: StepPart) -> None:
        marks.append((part, PROCESS.microbatch))

    batches = random_loader(config, mesh, StepLoader).step(0)
    forward_backward(model, mesh, batches[:3], mark)
    return marks


def test_passes_take_turns_while_tokens_are_on_their_way() -> None:
    # One of two layers has experts, with an exchange there and one back.
    model = MODELS["shared"]
    config = make_config(model, EP2 | {"ep_comm_overlap": True}, steps=1, micro_batch=1)

    def pair(forward: int, backward: int) -> list[Turn]:
        return [("forward", forward), ("backward", backward)] * 3

    for marks in run_ranks(turns, 2, config, timeout_s=180):
        assert marks == [
            ("forward", 0),
            *pair(1, 0),
            *pair(2, 1),
            ("backward", 2),
        ]
