"""One whole step without a device, in worlds of any size: whatever names a device or
waits for one fails here.

Tensors are on device `meta` and collectives go through torch's fake process group, so
nothing is computed and nothing sent.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ray.commands import NUM_VOTES
from megatron_ray.config.presets.presets import PRESETS
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.optimizer.step_sums import SkipRule
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step
from megatron_ray.validation import check
from tests.parallel.test_matrix import MATRIX
from tests.support.layout_matrix import EXPERTS, Entry
from tests.support.parity import END, LLAMA, make_config

LARGE: dict[str, Any] = {
    "model": {"preset": "llama3-405b"},
    "parallel": {
        "tp": 8,
        "cp": 2,
        "pp": 16,
        "dp": 64,
        "sequence_parallel": True,
        "first_stage_layers": 7,
        "last_stage_layers": 7,
    },
    "data": {"train": [{"path": "unused"}]},
    "training": {
        "seq_length": 8192,
        "micro_batch_size": 1,
        "global_batch_size": 128,
        "steps": 10,
        "precision": "bf16",
    },
    "optimizer": {"lr": 8e-5},
}


DEEPSEEK: dict[str, Any] = {
    "model": {"preset": "deepseek-v3"},
    "parallel": {
        "tp": 4,
        "pp": 16,
        "dp": 32,
        "ep": 64,
        "etp": 1,
        "sequence_parallel": True,
        "layout": "Ettt|(tttt|)*14ttmL",
    },
    "data": {"train": [{"path": "unused"}]},
    "training": {
        "seq_length": 4096,
        "micro_batch_size": 1,
        "global_batch_size": 512,
        "steps": 10,
        "precision": "bf16",
    },
    "optimizer": {"lr": 2.2e-4},
}


class OneToken:
    """Samples of whatever length, all alike."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(self.length + 1, END)

    def document_starts(self, index: int) -> np.ndarray:
        return np.zeros(self.length + 1, bool)


@contextmanager
def world(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


Around = Callable[[ParallelMesh], AbstractContextManager[object]]
"""Something that is to last as long as a step."""


def step(
    config: TrainConfig,
    rank: int,
    device: str,
    around: Around = lambda _: nullcontext(),
    number: int | None = None,
) -> None:
    dims = ParallelDims.of(config.parallel)
    training = config.training
    with world(rank, dims.world_size):
        mesh = ParallelMesh.create(dims, World(rank, dims.world_size, 0, device))
        model, optimizer = build(config, mesh, initialise=False)
        make_batch = batch_maker(config, mesh, END)
        loader = StepLoader(
            OneToken(training.seq_length),
            1,
            training.global_batch_size,
            mesh.dp_rank,
            dims.dp,
            make_batch,
        )
        batches = loader.step(0)
        nothing = [0.0] * NUM_VOTES
        with around(mesh):
            loss = forward_backward(model, mesh, batches)
            stats = reduce_step(
                model,
                optimizer,
                mesh,
                loss,
                sum(batch.num_tokens for batch in batches),
                nothing,
                SkipRule.IF_NOT_FINITE,
            )
            scale_and_clip(optimizer, stats, 1.0)
            optimizer.step(1e-3, stats.skip, number)
        assert stats.values.device.type == device


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=[pytest.mark.parity] if index % 5 else [])
        for index, entry in enumerate(MATRIX)
    ],
)
def test_every_layout_of_the_matrix_steps_without_a_device(entry: Entry) -> None:
    fields = entry.config(steps=1).model_dump()
    # rows sent between ranks are counted on the host; with full buffers there is
    # nothing to count
    if entry.experts:
        fields["model"]["moe"] = EXPERTS | {"capacity_factor": 1.0, "pad_to_capacity": True}
    # torch's fully_shard takes no parameters on meta; with the fake group no other rank
    # is needed all the same.
    step(
        TrainConfig.from_mapping(fields),
        entry.world_size - 1,
        "cpu" if entry.parallel["zero"] == 3 else "meta",
    )


RECOMPUTE: list[dict[str, Any]] = [
    {"granularity": "full", "method": "uniform", "num_layers": 1},
    {"granularity": "selective", "modules": ["core_attention", "norm", "activation"]},
    {"granularity": "operations"},
]


@pytest.mark.parametrize("recompute", RECOMPUTE, ids=["full", "selective", "operations"])
def test_recomputed_layers_with_dropout_step_without_a_device(
    recompute: dict[str, Any],
) -> None:
    fields = make_config(
        LLAMA | {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        {"dp": 1, "tp": 2, "pp": 2},
        steps=1,
    ).model_dump()
    fields["parallel"] |= {"sequence_parallel": True}
    fields["training"] |= {"recompute": recompute, "micro_batch_size": 1}
    step(TrainConfig.from_mapping(fields), 3, "meta")


# Of every family the sizes that differ most from Llama's, each rank with a few layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral-7b": {"tp": 4, "cp": 2, "sequence_parallel": True},
    "mixtral-8x7b": {"tp": 2, "dp": 4, "ep": 4, "sequence_parallel": True},
    "qwen2-7b": {"tp": 4},
    "qwen3-30b-a3b": {"tp": 8, "dp": 2, "ep": 8, "etp": 1, "sequence_parallel": True},
    "gemma-2b": {"tp": 2, "dp": 2},
    "llama3.2-1b": {"tp": 2, "cp": 2, "cp_method": "all_gather"},
}


@pytest.mark.parametrize("preset", FAMILIES)
def test_every_family_steps_without_a_device(preset: str) -> None:
    model: dict[str, Any] = {"preset": preset, "num_layers": 2}
    if "moe" in PRESETS[preset]:
        model["moe"] = PRESETS[preset]["moe"] | {
            "capacity_factor": 1.0,
            "pad_to_capacity": True,
        }
    parallel = {"dp": 1} | FAMILIES[preset]
    training = LARGE["training"] | {"global_batch_size": 2 * parallel["dp"]}
    config = TrainConfig.from_mapping(
        LARGE | {"model": model, "parallel": parallel, "training": training}
    )
    assert check.find_problems(config) == []
    step(config, ParallelDims.of(config.parallel).world_size - 1, "meta")


@pytest.mark.parametrize(
    "rank", [5, 8 * 2 * 64 * 15 + 77], ids=["first stage", "last stage"]
)
def test_a_rank_of_405b_on_16384_steps_without_a_device(rank: int) -> None:
    step(TrainConfig.from_mapping(LARGE), rank, "meta")


@pytest.mark.parametrize("rank", [5, 4 * 32 * 15 + 77], ids=["first stage", "last stage"])
def test_a_rank_of_deepseek_v3_on_2048_steps_without_a_device(rank: int) -> None:
    fields = TrainConfig.from_mapping(DEEPSEEK).model_dump()
    fields["model"]["moe"] |= {
        "capacity_factor": 1.0,
        "pad_to_capacity": True,
    }  # nothing to count on the host
    config = TrainConfig.from_mapping(fields)
    assert check.find_problems(config, 2048) == []
    step(config, rank, "meta")
