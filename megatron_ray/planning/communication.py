"""Bytes that one rank sends in a step, by axis and kind of collective.

Owns: that count, of exactly what the library sends.

Bytes are those of the tensors that a rank hands to its collectives: the whole tensor of
an all-reduce, a reduce-scatter or an all-to-all, its own part of an all-gather, what it
sends of a send or of a hop in a ring. What it receives is what others send. Everything
is taken to be trained, and experts to be balanced. Pure. Must not know: torch,
bandwidths, how a collective is carried out.

Letters as in `activations`: T tokens of a microbatch on a context-parallel rank, t = T
/ tp under sequence parallelism, else T.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from megatron_ray.commands import Command
from megatron_ray.config.moe import MoEConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.planning.buffers import (
    PlannedBuffer,
    RankBuffers,
    is_fully_sharded,
    rank_buffers,
)
from megatron_ray.planning.microbatch import (
    num_microbatches,
    own_tokens_of,
    tokens_of,
    width_of,
)
from megatron_ray.sharding.parameter_types import Part

Axis = Literal["tp", "cp", "pp", "dp", "ep", "etp", "edp", "embedding", "tokens", "world"]
"""`dp`: the replicas of dense parameters, dp x cp; `edp`: those of an expert; `tokens`:
tp x cp, who shares a microbatch; `embedding`: both holders of tied word embeddings."""
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass
class Tally:
    """Operations and bytes by axis and kind; groups of one rank send nothing."""

    sizes: dict[Axis, int]
    operations: dict[tuple[Axis, Kind], int] = field(default_factory=dict)
    bytes: dict[tuple[Axis, Kind], int] = field(default_factory=dict)

    def add(self, axis: Axis, kind: Kind, size: int, times: int = 1) -> None:
        """`times` operations of `size` bytes each."""
        if self.sizes[axis] > 1 and times and size:
            self.operations[axis, kind] = self.operations.get((axis, kind), 0) + times
            self.bytes[axis, kind] = self.bytes.get((axis, kind), 0) + times * size

    def add_all(self, other: "Tally", times: int = 1) -> None:
        """Everything in another tally, `times` over."""
        for (axis, kind), size in other.bytes.items():
            self.operations[axis, kind] = (
                self.operations.get((axis, kind), 0) + times * other.operations[axis, kind]
            )
            self.bytes[axis, kind] = self.bytes.get((axis, kind), 0) + times * size


def group_sizes(dims: ParallelDims) -> dict[Axis, int]:
    """Ranks of each group."""
    return {
        "tp": dims.tp,
        "cp": dims.cp,
        "pp": dims.pp,
        "dp": dims.size("dp", "cp"),
        "ep": dims.ep,
        "etp": dims.expert_tp,
        "edp": dims.expert_dp,
        "embedding": 2 if dims.pp > 1 else 1,
        "tokens": dims.size("tp", "cp"),
        "world": dims.world_size,
    }


def step_communication(config: TrainConfig, rank: int) -> Tally | None:
    """All that a rank of a resolved config sends in one step.

    None where the library does not send it by itself: under ZeRO-3, where torch gathers
    and scatters.
    """
    dims = ParallelDims.of(config.parallel)
    pipeline = plan_pipeline(config)
    if is_fully_sharded(config, dims):
        return None
    pp_rank = dims.coordinates(rank)["pp"]
    count = num_microbatches(config)
    found = Tally(group_sizes(dims))
    for chunk, stage in enumerate(pipeline.held(pp_rank)):
        found.add_all(stage_communication(config, dims, stage), count)
        found.add(
            "pp",
            "send",
            transfer_bytes(config),
            count * _neighbours(pipeline, pp_rank, chunk),
        )
    found.add_all(
        update_communication(
            config, dims, pipeline, rank_buffers(config, dims, pipeline, rank)
        )
    )
    return found


def transfer_bytes(config: TrainConfig) -> int:
    """Of one message between stages."""
    return own_tokens_of(config) * config.model.hidden_size * width_of(config)


def _neighbours(pipeline: PipelinePlan, pp_rank: int, chunk: int) -> int:
    """Other ranks to which a chunk sends: activations to the next stage, gradients to
    the one before.
    """
    stages = pipeline.stages
    stage = stages.stage(pp_rank, chunk)
    return sum(
        0 <= to < stages.num_stages and stages.home(to)[0] != pp_rank
        for to in (stage - 1, stage + 1)
    )


# ---- one microbatch


def stage_communication(
    config: TrainConfig, dims: ParallelDims, stage: StageContents
) -> Tally:
    """Of one microbatch, forward and backward, in one stage; without the messages
    between stages.
    """
    microbatch = _Microbatch(config, Tally(group_sizes(dims)))
    if stage.embedding:
        microbatch.embedding()
    further = stage.further(config.model.num_layers)
    layers = (*stage.layers, *further)
    kinds = {config.model.experts_on(layer) is not None: layer for layer in layers}
    for experts, layer in kinds.items():
        one = _Microbatch(config, Tally(microbatch.tally.sizes))
        one.attention_forward()
        one.attention_backward()
        one.feed_forward(layer)
        one.feed_backward(layer)
        microbatch.tally.add_all(
            one.tally,
            sum(
                (config.model.experts_on(index) is not None) == experts for index in layers
            ),
        )
    microbatch.recomputed(stage.layers)
    if stage.loss:
        microbatch.head()
    for layer in (
        further
        # each looks up the tokens after those of the one before, and has the head once more
    ):
        microbatch.embedding()
        microbatch.recomputed([layer])
        microbatch.head()
    return microbatch.tally


class _Microbatch:
    """Adds what parts of the model send to a tally."""

    def __init__(self, config: TrainConfig, tally: Tally) -> None:
        self.config = config
        self.model = config.model
        self.parallel = config.parallel
        self.tally = tally
        self.width = width_of(config)
        self.tokens = tokens_of(config)
        self.own = own_tokens_of(config)
        self.hidden = self.width * config.model.hidden_size
        """Bytes of a token's activations."""

    # ---- tensor parallelism: Megatron-LM's f and g, and their sequence-parallel forms

    def embedding(self) -> None:
        """Forward and backward."""
        self._sum()
        self._gather()

    def head(self) -> None:
        """Forward and backward; of the softmax the largest logit, then sum and label's
        logit, fp32.
        """
        self._gather()
        self.tally.add("tp", "all_reduce", 4 * self.tokens)
        self.tally.add("tp", "all_reduce", 8 * self.tokens)
        self._sum()

    def _column_backward(self, width: int | None = None) -> None:
        self._gather(width)  # of the inputs, for the weight gradient
        self._sum(width)

    def _gather(self, width: int | None = None) -> None:
        """Of tokens, where they are cut over tp; `width`: not of hidden states but of
        so many numbers each.
        """
        if self.parallel.sequence_parallel:
            self.tally.add("tp", "all_gather", self.own * self._bytes(width))

    def _sum(self, width: int | None = None) -> None:
        """Over tp; each keeps its tokens where they are cut."""
        kind: Kind = "reduce_scatter" if self.parallel.sequence_parallel else "all_reduce"
        self.tally.add("tp", kind, self.tokens * self._bytes(width))

    def _bytes(self, width: int | None) -> int:
        return self.hidden if width is None else self.width * width

    def attention_forward(self) -> None:
        for width in self._read_by_heads:
            self._gather(width)
        if self.model.mla is not None:
            self._gather(self.model.mla.qk_rope_head_dim)
        self._core_forward()
        self._sum()

    def attention_backward(self) -> None:
        self._gather()
        self._core_backward()
        if (
            self.model.mla is not None
        ):  # the part of the key that all heads share; nothing of it is needed again
            self._sum(self.model.mla.qk_rope_head_dim)
        for width in self._read_by_heads:
            self._column_backward(width)

    @property
    def _read_by_heads(self) -> tuple[int | None, ...]:
        """Widths of what products cut by heads take: hidden states (None), or the
        latents, which are made of a rank's own tokens.
        """
        mla = self.model.mla
        return (None,) if mla is None else (mla.q_lora_rank, mla.kv_lora_rank)

    def _mlp_forward(self, *, unread: bool = False) -> None:
        self._gather()
        if not unread:
            self._sum()

    def _mlp_backward(self) -> None:
        self._gather()
        self._column_backward()

    # ---- context parallelism

    def _core_forward(self) -> None:
        cp = self.parallel.cp
        method = self.parallel.cp_method
        if method == "all_gather":
            self.tally.add("cp", "all_gather", self._keys_values * self.width)
        if method.startswith("a2a"):
            self._exchange()
        self.tally.add("cp", "send", self._keys_values * self.width, self._hops(cp, method))

    def _core_backward(self) -> None:
        cp = self.parallel.cp
        method = self.parallel.cp_method
        if method == "all_gather":
            self.tally.add("cp", "all_gather", self._keys_values * self.width)
            self.tally.add("cp", "reduce_scatter", self._keys_values * 4 * cp)
        if method.startswith("a2a"):
            self._exchange()
        hops = self._hops(cp, method)
        self.tally.add("cp", "send", self._keys_values * self.width, hops)
        self.tally.add(
            "cp", "send", self._keys_values * 4, hops + 1 if hops else 0
        )  # gradients go all the way home

    def _hops(self, cp: int, method: str) -> int:
        sizes = self.parallel.hierarchical_cp_sizes
        return {"p2p": cp, "a2a+p2p": sizes[1] if sizes else 1}.get(method, 1) - 1

    def _exchange(self) -> None:
        """Queries, keys, values and outputs one way, or their gradients the other way."""
        sizes = self.parallel.hierarchical_cp_sizes
        if self.parallel.cp_method == "a2a+p2p" and (sizes is None or sizes[0] == 1):
            return
        queries = (
            self.tokens
            * self.model.num_attention_heads
            * self.model.head_width
            // self.parallel.tp
        )
        self.tally.add("cp", "all_to_all", queries * self.width, 2)
        self.tally.add("cp", "all_to_all", self._keys_values // 2 * self.width, 2)

    @property
    def _keys_values(self) -> int:
        """Elements of the keys and values of this rank's heads and tokens."""
        heads = max(self.model.kv_heads, self.parallel.tp) // self.parallel.tp
        return 2 * self.tokens * heads * self.model.head_width

    # ---- MLPs and experts

    def feed_forward(self, layer: int) -> None:
        moe = self.model.experts_on(layer)
        if moe is None:
            self._mlp_forward()
            return
        self._experts_forward(moe)
        # once, also where the layer is recomputed: only a forward pass with gradients
        # makes the loss
        if moe.aux_loss_coeff:
            sequences = (
                1 if moe.aux_loss == "aux_loss" else self.config.training.micro_batch_size
            )
            self.tally.add("tokens", "all_reduce", 4 * sequences * moe.num_experts)

    def feed_backward(self, layer: int) -> None:
        moe = self.model.experts_on(layer)
        if moe is None:
            self._mlp_backward()
            return
        if moe.shared_expert_ffn_hidden_size is not None:
            self._mlp_backward()
        self._dispatch(moe)  # gradients come back the way the rows went
        if self.parallel.dispatcher == "allgather":
            self._weights_backward(moe)

    def _experts_forward(self, moe: MoEConfig) -> None:
        if moe.shared_expert_ffn_hidden_size is not None:
            self._mlp_forward()
        if self.parallel.dispatcher == "allgather":
            inner = self.own * self.parallel.expert_tp
            for size in (8, 4):  # numbers of the chosen experts, and their weights
                self.tally.add("etp", "all_gather", size * moe.top_k * self.own)
                self.tally.add("ep", "all_gather", size * moe.top_k * inner)
        elif not moe.pad_to_capacity:  # how many rows for each expert
            self.tally.add("ep", "all_to_all", 8 * moe.num_experts)
            self.tally.add("etp", "all_gather", 8 * moe.num_experts)
        self._dispatch(moe)

    def _dispatch(self, moe: MoEConfig) -> None:
        """Rows to their experts and outputs back; in a backward pass the same the other
        way round.
        """
        ep = self.parallel.ep
        etp = self.parallel.expert_tp
        if self.parallel.dispatcher == "allgather":
            for axis, rows, size in (("etp", self.own, etp), ("ep", self.own * etp, ep)):
                self.tally.add(axis, "all_gather", rows * self.hidden)  # type: ignore[arg-type]
                self.tally.add(axis, "reduce_scatter", rows * size * self.hidden)  # type: ignore[arg-type]
            return
        rows = self._rows(moe) * self.hidden
        self.tally.add("ep", "all_to_all", rows, 2)
        self.tally.add("etp", "all_gather", rows)
        self.tally.add("etp", "reduce_scatter", rows * etp)

    def _weights_backward(self, moe: MoEConfig) -> None:
        """Gradients of the gathered routing weights, fp32."""
        inner = self.own * self.parallel.expert_tp
        self.tally.add("ep", "reduce_scatter", 4 * moe.top_k * inner * self.parallel.ep)
        self.tally.add("etp", "reduce_scatter", 4 * moe.top_k * inner)

    def _rows(self, moe: MoEConfig) -> int:
        """That this rank sends out: one for each expert of each of its tokens, unless
        there is a limit.
        """
        chosen = self.own * moe.top_k
        if moe.capacity_factor is None:
            return chosen
        room = moe.num_experts * min(
            self.own, ceil(chosen / moe.num_experts * moe.capacity_factor)
        )
        return room if moe.pad_to_capacity else min(chosen, room)

    # ---- recomputation

    def recomputed(self, layers: Sequence[int]) -> None:
        """The second forward passes; the last product of a region is not summed again,
        because nothing reads it.
        """
        recompute = self.config.training.recompute
        if recompute.granularity == "full":
            for chunk in _chunks(
                layers, recompute.method == "uniform", recompute.num_layers or 1
            ):
                for layer in chunk:
                    self.attention_forward()
                    self._feed_again(layer, unread=layer == chunk[-1])
            return
        for layer in layers:
            experts = self.model.experts_on(layer) is not None
            if "core_attention" in recompute.chosen_modules:
                self._core_forward()
            if ("moe" if experts else "mlp") in recompute.chosen_modules:
                self._feed_again(layer, unread=True)

    def _feed_again(self, layer: int, *, unread: bool) -> None:
        moe = self.model.experts_on(layer)
        if moe is None:
            self._mlp_forward(unread=unread)
        else:
            self._experts_forward(moe)


def _chunks(layers: Sequence[int], uniform: bool, size: int) -> Iterable[Sequence[int]]:
    """Regions that are recomputed at once."""
    if uniform:
        return [layers[start : start + size] for start in range(0, len(layers), size)]
    return [[layer] for layer in layers[:size]]


# ---- once a step


def update_communication(
    config: TrainConfig, dims: ParallelDims, pipeline: PipelinePlan, held: RankBuffers
) -> Tally:
    """Of one step on a rank: gradients, weights, and the step's numbers."""
    found = Tally(group_sizes(dims))
    for buffer in held.buffers:
        axis: Axis = "edp" if buffer.of_expert else "dp"
        for bucket in buffer.plan.buckets:
            size = bucket.end - bucket.start
            found.add(axis, "reduce_scatter" if buffer.sharded else "all_reduce", 4 * size)
            if buffer.sharded:
                found.add(axis, "all_gather", buffer.width * size // buffer.replicas)
    _add_shared(found, dims, held.buffers)
    model = config.model
    layers = [
        layer
        for stage in pipeline.held(held.pp_rank)
        for layer in (*stage.layers, *stage.further(model.num_layers))
    ]
    biases = [
        moe.num_experts
        for layer in layers
        if (moe := model.experts_on(layer)) is not None and moe.expert_bias
    ]
    found.add("tokens", "all_reduce", 4 * sum(biases))
    if dims.dp > 1:
        found.add("dp", "all_reduce", 4 * sum(biases))
    # loss, tokens, squared norm; other losses; what ranks are told
    found.add("world", "all_reduce", 8 * (3 + len(model.aux_losses) + len(Command) - 1))
    return found


def _add_shared(found: Tally, dims: ParallelDims, buffers: Sequence[PlannedBuffer]) -> None:
    """Gradients that more ranks than the replicas hold parts of, as far as this rank
    updates them; fp32.
    """
    over_tp = heads = num_kv_replicas = 0
    for buffer in buffers:
        for bucket in buffer.plan.buckets:
            for placed in bucket.placed:
                parameter = placed.parameter
                owned = buffer.owned(placed.start, placed.end)
                over_tp += owned if parameter.sum_over_tp else 0
                if parameter.is_shared_embedding:
                    found.add("embedding", "all_reduce", 4 * owned)
                shared: list[Part] = [
                    part for part in parameter.parts if part.num_kv_replicas > 1
                ]
                for part in shared:
                    start = placed.part_start(part)
                    heads = heads + buffer.owned(start, start + part.box.num_elements)
                    num_kv_replicas = part.num_kv_replicas
    found.add("tp", "all_reduce", 4 * over_tp)
    found.add(
        "tp",
        "all_reduce",
        4 * heads * (dims.tp // num_kv_replicas if num_kv_replicas else 1),
    )
