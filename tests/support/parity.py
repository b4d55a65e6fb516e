"""Trains one tiny model under any layout and brings home what layouts are compared by:
initial weights, first gradients, losses, norms, weights. Runs inside real ranks;
results are numpy, reassembled by logical name in the parent.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_ray.commands import Command
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.data.sampler import sample_ids
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.models.batch import Batch
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import Report, StepReport
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward, reduce_step

END = 7
"""Token that ends a document, where documents are kept apart."""
LLAMA: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "vocab_size": 259,
    "max_sequence_length": 32,
    "vocab_multiple": 32,
}
GPT2_FIELDS: dict[str, Any] = {
    "num_query_groups": 4,
    "activation": "gelu_tanh",
    "norm": "layernorm",
    "position_embedding": "learned",
    "linear_bias": True,
    "tie_embeddings": True,
}
"""What makes a Llama of four heads a GPT-2."""
GPT2 = LLAMA | GPT2_FIELDS


Loader = TypeVar("Loader", bound=StepLoader)


class RandomDataset:
    """Sample i is a pure function of i."""

    def __init__(self, vocabulary: int, seq_length: int, ends: float = 0.0) -> None:
        """`ends`: how often a document ends."""
        self.vocabulary = vocabulary
        self.seq_length = seq_length
        self.ends = ends

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((99, index))
        first = rng.integers(0, self.vocabulary)
        # Half predictable, so that there is something to learn and gradients do not die
        # out.
        steps = np.where(
            rng.random(self.seq_length + 1) < 0.5,
            1,
            rng.integers(0, self.vocabulary, self.seq_length + 1),
        )
        tokens = (first + np.cumsum(steps)) % self.vocabulary
        return (
            np.where(rng.random(self.seq_length + 1) < self.ends, END, tokens)
            if self.ends
            else tokens
        )

    def document_starts(self, index: int) -> np.ndarray:
        """None but the first token: only end tokens tell documents apart."""
        starts: np.ndarray = np.arange(self.seq_length + 1) == 0
        return starts


class NoSaver:
    """Stands in for checkpoints."""

    def save(self, progress: Progress) -> None:
        pass

    def wait(self) -> None:
        pass


@dataclass
class RankResult:
    """What one rank brings home; boxes are (logical name, offset, values)."""

    initial: list[tuple[str, tuple[int, ...], np.ndarray]]
    gradients: list[tuple[str, tuple[int, ...], np.ndarray]]
    weights: list[tuple[str, tuple[int, ...], np.ndarray]]
    losses: list[float]
    grad_norms: list[float]
    other_losses: list[list[float]]
    state_bytes: int
    model_bytes: int
    choices: list[tuple[int, np.ndarray]]
    """What routers chose, microbatch by microbatch: (layer, experts [tokens, K])."""


def make_config(
    model: dict[str, Any],
    parallel: dict[str, Any],
    *,
    steps: int,
    precision: str = "fp32",
    batch: int = 8,
    micro_batch: int = 2,
    separate_documents: bool = False,
    compiled: bool = False,
) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": model,
            "parallel": parallel,
            "data": {
                "train": [{"path": "unused"}],
                "separate_documents": separate_documents,
            },
            "training": {
                "seq_length": 32,
                "micro_batch_size": micro_batch,
                "global_batch_size": batch,
                "steps": steps,
                "precision": precision,
                "compile": "blocks" if compiled else "none",
                "seed": 7,
            },
            "optimizer": {
                "lr": 3e-3,
                "eps": 1e-5,
                "weight_decay": 0.1,
                "clip_grad_norm": 1.0,
            },
            "schedule": {"kind": "cosine", "warmup_steps": 3},
        }
    )


def make_mesh(rank: int, world_size: int, config: TrainConfig) -> ParallelMesh:
    return ParallelMesh.create(
        ParallelDims.of(config.parallel, world_size), World(rank, world_size, 0, "cpu")
    )


def random_loader(
    config: TrainConfig, mesh: ParallelMesh, loader_class: type[Loader]
) -> Loader:
    """A rank's loader of random tokens."""
    training = config.training
    return loader_class(
        RandomDataset(config.model.vocabulary, training.seq_length),
        training.micro_batch_size,
        training.global_batch_size,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh),
    )


def boxes(
    state: ShardedState, prefix: str = ""
) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    owned = []
    for name, entry in state.items():
        if name.startswith(prefix):
            owned += [
                (
                    name.removeprefix(prefix),
                    box.box.offset,
                    box.tensor.detach().clone().numpy(),
                )
                for box in entry.boxes
            ]
    return owned


class Replay:
    """Batches that tell routers what to choose: [steps, samples of a step, tokens,
    layers, K].
    """

    def __init__(self, loader: StepLoader, choices: np.ndarray) -> None:
        self.loader = loader
        self.choices = choices

    def step(self, consumed_samples: int) -> list[Batch]:
        loader = self.loader
        (step, rest) = divmod(consumed_samples, self.choices.shape[1])
        assert rest == 0
        rows = sample_ids(
            0,
            loader.micro_batch_size,
            loader.dp_rank,
            loader.dp,
            loader.num_microbatches(consumed_samples),
        )
        cut = loader.make_batch.cut
        of_step = torch.from_numpy(
            self.choices[step][:, cut.positions(self.choices.shape[2])]
        )
        return [
            replace(batch, routing_replay=of_step[torch.as_tensor(ids)])
            for batch, ids in zip(loader.step(consumed_samples), rows, strict=True)
        ]


def run_layout(
    rank: int,
    world_size: int,
    config: TrainConfig,
    weights_after: int = 5,
    choices: np.ndarray | None = None,
) -> RankResult:
    """The first step's gradients, then the real loop from the same start; routers take
    `choices` (see `Replay`) where given.
    """
    torch.set_num_threads(1)
    mesh = make_mesh(rank, world_size, config)
    training = config.training
    dataset = RandomDataset(
        config.model.vocabulary,
        training.seq_length,
        ends=0.15 if config.data.separate_documents else 0.0,
    )
    loader: Any = StepLoader(
        dataset,
        training.micro_batch_size,
        training.global_batch_size,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh, END),
    )
    if choices is not None:
        loader = Replay(loader, choices)

    model, optimizer = build(config, mesh)
    initial = boxes(optimizer.sharded_state(), "model/")
    batches = loader.step(0)
    loss = forward_backward(model, mesh, batches)
    stats = reduce_step(
        model, optimizer, mesh, loss, sum(batch.num_tokens for batch in batches)
    )
    scale_and_clip(optimizer, stats, clip_grad_norm=0)
    gradients = boxes(optimizer.sharded_gradients())

    model, optimizer = build(config, mesh)
    chosen: list[tuple[int, np.ndarray]] = []
    model.module.on_route = lambda layer, experts: chosen.append(
        (layer, experts.numpy().copy())
    )
    weights: list[tuple[str, tuple[int, ...], np.ndarray]] = []
    reports: list[StepReport] = []

    def note(report: Report) -> None:
        # fp16 also reports the steps that it skips.
        if isinstance(report, StepReport):
            reports.append(report)

    def poll() -> Command:
        if len(reports) == weights_after:
            weights.extend(boxes(optimizer.sharded_state(), "model/"))
        return Command.CONTINUE

    assert (
        train(
            TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver()),
            Progress(),
            note,
            poll,
        )
        == "finished"
    )
    return RankResult(
        initial,
        gradients,
        weights,
        [report.loss for report in reports],
        [report.grad_norm for report in reports],
        [list(report.other_losses.values()) for report in reports],
        sum(
            flat.numel() * flat.element_size()
            for shard in optimizer.shards
            for flat in (*shard.state.values(), *shard.matrix_state.values())
        ),
        sum(
            family.buffers.parameters.numel() * family.buffers.parameters.element_size()
            for family in model.parameter_groups
        ),
        chosen,
    )


def record_choices(config: TrainConfig, one: RankResult) -> np.ndarray:
    """What the routers of one rank chose: [steps, samples of a step, tokens, layers,
    K]; -1 for layers without experts.
    """
    assert config.model.moe is not None
    training = config.training
    layers = config.model.num_layers + config.model.num_mtp_layers
    samples = training.micro_batch_size
    length = training.seq_length
    choices = np.full(
        (
            training.num_steps,
            training.global_batch_size,
            length,
            layers,
            config.model.moe.top_k,
        ),
        -1,
        dtype=np.int64,
    )
    seen = dict.fromkeys(range(layers), 0)
    for layer, experts in one.choices:
        step, start = divmod(seen[layer], training.global_batch_size)
        choices[step, start : start + samples, :, layer] = experts.reshape(
            samples, length, -1
        )
        seen[layer] += samples
    assert set(seen.values()) <= {0, training.num_steps * training.global_batch_size}
    return choices


def assemble(
    config: TrainConfig, parts: list[list[tuple[str, tuple[int, ...], np.ndarray]]]
) -> dict[str, np.ndarray]:
    """Full tensors from every rank's boxes; replicas must agree to the bit, and
    everything must be covered.
    """
    from megatron_ray.sharding.parameters import logical_parameters

    full = {
        parameter.name: np.full(parameter.shape, np.nan, dtype=np.float32)
        for parameter in logical_parameters(config.model)
    }
    for rank_boxes in parts:
        for name, offset, values in rank_boxes:
            where = tuple(
                slice(start, start + size)
                for start, size in zip(offset, values.shape, strict=True)
            )
            before = full[name][where]
            known = ~np.isnan(before)
            assert np.array_equal(before[known], values[known]), (
                f"replicas of {name} differ"
            )
            full[name][where] = values
    for name, tensor in full.items():
        assert not np.isnan(tensor).any(), f"{name} is not covered"
    return full


def relative_l2(measured: np.ndarray, reference: np.ndarray, floor: float) -> float:
    """||measured - reference|| / max(||reference||, floor), in float64."""
    wide = reference.astype(np.float64)
    return float(
        np.linalg.norm(measured.astype(np.float64) - wide)
        / max(float(np.linalg.norm(wide)), floor)
    )


def worst_relative_l2(
    measured: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> tuple[float, str]:
    """Largest per-tensor distance and its name; the floor is 1e-8 of the largest norm."""
    floor = 1e-8 * max(float(np.linalg.norm(tensor)) for tensor in reference.values())
    return max(
        (relative_l2(measured[name], tensor, floor), name)
        for name, tensor in reference.items()
    )


def split_vanishing(
    config: TrainConfig, gradients: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(all others, those that are zero in exact arithmetic and hence only rounding):
    without rotary positions a key bias shifts all scores of a query alike, which
    softmax does not see.
    """
    rotary = config.model.position_embedding == "rope"
    vanishing = {
        name for name in gradients if name.endswith("attention.k.bias") and not rotary
    }
    return (
        {name: tensor for name, tensor in gradients.items() if name not in vanishing},
        {name: tensor for name, tensor in gradients.items() if name in vanishing},
    )


def float64_gradients(
    rank: int, world_size: int, config: TrainConfig, choices: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Gradients of the first step in double precision on one rank, by plain autograd:
    no slots, no buckets, no reductions.
    """
    from megatron_ray.models.initialization import init_local
    from megatron_ray.parallelize.parallelize import build_model
    from megatron_ray.sharding.parameters import local_parameters

    mesh = ParallelMesh.single()
    module = build_model(
        config.model, mesh, ParallelismConfig(), dtype=torch.float64
    ).to_empty(device="cpu")
    if config.model.tie_embeddings:
        assert module.head is not None
        assert module.embedding is not None
        module.head.weight = (
            module.embedding.weight
        )  # to_empty has made two of the shared one
    table = local_parameters(config.model, mesh.dims, 0)
    parameters = dict(module.named_parameters())
    for local in table:
        parameters[local.name].data.copy_(init_local(local, config.training.seed))
    training = config.training
    dataset = RandomDataset(
        config.model.vocabulary,
        training.seq_length,
        ends=0.15 if config.data.separate_documents else 0.0,
    )
    loader = StepLoader(
        dataset,
        training.micro_batch_size,
        training.global_batch_size,
        0,
        1,
        batch_maker(config, mesh, END),
    )
    batches = (loader if choices is None else Replay(loader, choices)).step(0)
    for batch in batches:
        targets = batch.mtp_targets
        if targets is not None:
            targets = replace(targets, loss_mask_DBS=targets.loss_mask_DBS.double())
        module(
            replace(batch, loss_mask_BS=batch.loss_mask_BS.double(), mtp_targets=targets)
        ).backward()
    tokens = sum(batch.num_tokens for batch in batches)
    gradients = {}
    for local in table:
        gradient = parameters[local.name].grad
        assert gradient is not None
        for part in local.parts:
            gradients[part.logical.name] = (
                gradient.narrow(0, part.start, part.box.size[0]) / tokens
            ).numpy()
    return gradients
