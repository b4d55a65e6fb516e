"""The table of parameters: what exists, how big, who holds which box.

Owns: names, shapes, boxes, init, reduction, decay.

Everything that touches weights (initialisation, fused layers, buckets, clipping,
checkpoints, conversion, planning) reads this table, and nothing derives it anew. Pure
Python. Must not know: torch, process groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod, sqrt
from typing import Literal

from megatron_ray.config.latent import LatentAttentionConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.layout import StageContents, split_into_stages
from megatron_ray.sharding.boxes import Box


@dataclass(frozen=True)
class Init:
    """How a logical tensor starts."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


@dataclass(frozen=True)
class LogicalParameter:
    """One unfused tensor as a checkpoint names it, whatever the layout."""

    name: str
    shape: tuple[int, ...]
    """Full shape, vocabulary padding left out."""
    init: Init
    shard_dim: int | None
    """Dimension cut over tp (an expert's: over etp); None: every tp rank holds the
    whole tensor."""
    decay: bool
    """Whether weight decay applies."""
    sum_over_tp: bool = False
    """Each tp rank sees only its tokens (sequence parallelism) or its heads (norms of
    queries and keys), so this replicated tensor's gradient is summed over tp."""
    of_expert: bool = False
    """Lies in the expert grid: cut over etp, held by one ep rank, its gradient reduced
    over edp and not over dp x cp."""

    @property
    def num_elements(self) -> int:
        """Elements of the full tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Part:
    """A logical tensor's box inside a rank's (possibly fused) tensor; parts lie one
    after another along dim 0.
    """

    logical: LogicalParameter
    box: Box
    start: int
    """First row of the part in the local tensor."""
    num_kv_replicas: int = 1
    """Neighbouring tp ranks that hold this very box, where there are fewer key/value
    heads than ranks; each has a part of its gradient."""
    owns_norm: bool = True
    """False but for the first of those, so that the global norm has it once."""


@dataclass(frozen=True)
class LocalParameter:
    """One tensor as a rank holds it: the name of the module's parameter, its shape, and
    the boxes fused in it.
    """

    name: str
    shape: tuple[int, ...]
    """Local shape; rows beyond the last part are vocabulary padding, always zero."""
    parts: tuple[Part, ...]
    is_shared_embedding: bool = False
    """A word embedding that the last pipeline stage needs too, as its tied head or for
    layers that predict further tokens: both hold it, and their gradients are added up.
    """
    owns_norm: bool = True
    """False for the second of those, so that the global norm has it once."""
    trainable: bool = True
    """False where it is frozen: no gradient, no optimizer state."""

    @property
    def decay(self) -> bool:
        """Parts share one decay group."""
        return self.parts[0].logical.decay

    @property
    def tp_sharded(self) -> bool:
        """Whether each tp rank holds different elements; so do all ranks but the
        replicas for those of experts.
        """
        return self.parts[0].logical.shard_dim is not None

    @property
    def sum_over_tp(self) -> bool:
        """Whether gradients need a sum over tp."""
        return self.parts[0].logical.sum_over_tp

    @property
    def of_expert(self) -> bool:
        """Whether its replicas are those of the expert grid."""
        return self.parts[0].logical.of_expert

    @property
    def num_elements(self) -> int:
        """Elements a rank holds, padding included."""
        return prod(self.shape)


def padded_vocabulary(model: ModelConfig, tp: int) -> int:
    """Rows of the embedding with padding: the next multiple of vocab_multiple x tp
    (Megatron's rule).
    """
    multiple = model.vocab_multiple * tp
    return -(-model.vocabulary // multiple) * multiple


def local_parameters(
    model: ModelConfig,
    dims: ParallelDims,
    rank: int,
    *,
    sequence_parallel: bool = False,
    held: Sequence[StageContents] | None = None,
) -> tuple[LocalParameter, ...]:
    """The tensors of one rank, in the order in which the forward pass uses them.

    `held`: its pipeline stages; the whole model when not given.

    Raises ValueError when tp does not divide a sharded dimension (validation says it
    better, with the remedy).
    """
    builder = _LocalTable(model, dims, rank, sequence_parallel)
    return builder.build(whole_model(model) if held is None else held)


def whole_model(model: ModelConfig) -> tuple[StageContents, ...]:
    """The one stage that holds everything."""
    return split_into_stages(model.num_layers, 1, num_mtp_layers=model.num_mtp_layers)


def logical_parameters(model: ModelConfig) -> tuple[LogicalParameter, ...]:
    """Every logical tensor of the model, in forward order."""
    return tuple(
        part.logical
        for local in local_parameters(model, ParallelDims(), 0)
        for part in local.parts
    )


def freeze(
    table: Sequence[LocalParameter], patterns: Sequence[str]
) -> tuple[LocalParameter, ...]:
    """The table with those parameters frozen whose logical names match; parts of one
    tensor are frozen together or not at all (validation refuses anything else).
    """

    def trainable(local: LocalParameter) -> bool:
        return not any(
            fnmatchcase(part.logical.name, pattern)
            for part in local.parts
            for pattern in patterns
        )

    if not patterns:
        return tuple(table)
    return tuple(replace(local, trainable=trainable(local)) for local in table)


class _LocalTable:
    """Collects one rank's tensors; the only place that knows which dimension of what is
    cut.
    """

    def __init__(
        self, model: ModelConfig, dims: ParallelDims, rank: int, sequence_parallel: bool
    ) -> None:
        self.model = model
        self.dims = dims
        self.sequence_parallel = sequence_parallel
        self.tp = dims.tp
        self.tp_rank = dims.coordinates(rank)["tp"]
        self.expert_place = dims.experts.coordinates(rank)
        self.found: list[LocalParameter] = []
        self.normal = Init("normal", model.init_std)
        self.to_residual = Init("normal", model.init_std / sqrt(2 * model.num_layers))

    def build(self, held: Sequence[StageContents]) -> tuple[LocalParameter, ...]:
        model = self.model
        has_embedding, has_head = (
            any(getattr(stage, part) for stage in held) for part in ("embedding", "loss")
        )
        needed_last = model.tie_embeddings or model.num_mtp_layers > 0
        if has_embedding:
            self._vocabulary(
                "embedding.weight", is_shared_embedding=needed_last and not has_head
            )
            if model.position_embedding == "learned":
                shape = (model.max_sequence_length, model.hidden_size)
                self._replicated(
                    "position_embedding.weight", shape, self.normal, decay=True
                )
        elif has_head and model.num_mtp_layers:
            self._vocabulary("embedding.weight", is_shared_embedding=True, owns_norm=False)
        for stage in held:
            for layer in stage.layers:
                self._block(f"layers.{layer}.", layer)
        if has_head:
            self._norm("final_norm")
            self._head(has_embedding)
        for stage in held:
            for depth in stage.mtp_layers:
                self._further(depth)
        return tuple(self.found)

    def _head(self, has_embedding: bool) -> None:
        if not self.model.tie_embeddings:
            self._vocabulary("head.weight")
        elif not has_embedding and not self.model.num_mtp_layers:
            self._vocabulary(
                "head.weight", "embedding.weight", is_shared_embedding=True, owns_norm=False
            )

    def _further(self, depth: int) -> None:
        hidden = self.model.hidden_size
        prefix = f"mtp.{depth}."
        self._norm(prefix + "embedding_norm")
        self._norm(prefix + "hidden_norm")
        self._replicated(
            prefix + "projection.weight", (hidden, 2 * hidden), self.normal, decay=True
        )
        self._block(prefix + "block.", self.model.num_layers + depth)
        self._norm(prefix + "final_norm")

    def _block(self, prefix: str, layer: int) -> None:
        self._norm(prefix + "attention_norm")
        if self.model.mla is None:
            self._attention(prefix)
        else:
            self._latent_attention(prefix + "attention.", self.model.mla)
        self._norm(prefix + "mlp_norm")
        self._feed_forward(prefix, layer)

    def _attention(self, prefix: str) -> None:
        model = self.model
        hidden = model.hidden_size
        heads = model.num_attention_heads * model.head_width
        kv = model.kv_heads * model.head_width
        num_kv_replicas = max(1, self.tp // model.kv_heads)
        outputs = {
            "attention.q": (heads, 1),
            "attention.k": (kv, num_kv_replicas),
            "attention.v": (kv, num_kv_replicas),
        }
        self._column(
            prefix + "attention.qkv", outputs, hidden, prefix, bias=model.has_qkv_bias
        )
        if model.qk_norm:
            for name in ("q_norm", "k_norm"):
                self._norm(f"{prefix}attention.{name}", model.head_width, of_heads=True)
        self._row(prefix + "attention.o", hidden, heads)

    def _latent_attention(self, prefix: str, mla: LatentAttentionConfig) -> None:
        """Heads are cut over tp; what comes before them is whole on every rank."""
        hidden = self.model.hidden_size
        heads = self.model.num_attention_heads
        queries = heads * mla.qk_head_dim
        keys_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        if mla.q_lora_rank is None:
            self._column(prefix + "q", {"q": (queries, 1)}, hidden, prefix, bias=False)
        else:
            self._replicated(
                prefix + "q_down.weight", (mla.q_lora_rank, hidden), self.normal, decay=True
            )
            self._norm(prefix + "q_norm", mla.q_lora_rank)
            self._column(
                prefix + "q_up", {"q_up": (queries, 1)}, mla.q_lora_rank, prefix, bias=False
            )
        self._replicated(
            prefix + "kv_down.weight",
            (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
            self.normal,
            decay=True,
        )
        self._norm(prefix + "kv_norm", mla.kv_lora_rank)
        self._column(
            prefix + "kv_up",
            {"kv_up": (keys_values, 1)},
            mla.kv_lora_rank,
            prefix,
            bias=False,
        )
        self._row(prefix + "o", hidden, heads * mla.v_head_dim)

    def _feed_forward(self, prefix: str, layer: int) -> None:
        model = self.model
        hidden = model.hidden_size
        moe = model.experts_on(layer)
        if moe is None:
            self._mlp(prefix + "mlp.", model.ffn_width)
            return
        self._replicated(
            prefix + "moe.router.weight", (moe.num_experts, hidden), self.normal, decay=True
        )
        self._experts(prefix + "moe.experts.", moe.num_experts)
        if moe.shared_expert_ffn_hidden_size is not None:
            self._mlp(prefix + "moe.shared.", moe.shared_expert_ffn_hidden_size)

    def _mlp(self, prefix: str, width: int) -> None:
        fused, names = self._inputs_of_mlp()
        self._column(
            prefix + fused,
            dict.fromkeys(names, (width, 1)),
            self.model.hidden_size,
            prefix,
            bias=self.model.linear_bias,
        )
        self._row(prefix + "down", self.model.hidden_size, width)

    def _inputs_of_mlp(self) -> tuple[str, tuple[str, ...]]:
        """Name of the fused tensor, and what is fused in it."""
        return ("gate_up", ("gate", "up")) if self.model.gated else ("up", ("up",))

    def _experts(self, prefix: str, num_experts: int) -> None:
        """This rank's neighbouring experts one after another in two tensors; each is
        cut over etp as an MLP is over tp.
        """
        hidden = self.model.hidden_size
        ep = self.dims.ep
        etp = self.dims.expert_tp
        if num_experts % ep or self.model.expert_width % etp:
            raise ValueError(
                f"{prefix}: {num_experts} experts {self.model.expert_width} wide do not "
                f"divide by ep={ep} and etp={etp}"
            )
        each = num_experts // ep
        width = self.model.expert_width // etp
        fused, names = self._inputs_of_mlp()
        first = width * self.expert_place["etp"]
        inwards = list[Part]()
        outwards = list[Part]()
        for expert in range(
            each * self.expert_place["ep"], each * (self.expert_place["ep"] + 1)
        ):
            for name in names:
                shape = (self.model.expert_width, hidden)
                logical = LogicalParameter(
                    f"{prefix}{expert}.{name}.weight",
                    shape,
                    self.normal,
                    0,
                    decay=True,
                    of_expert=True,
                )
                inwards.append(
                    Part(logical, Box((first, 0), (width, hidden)), width * len(inwards))
                )
            shape = (hidden, self.model.expert_width)
            logical = LogicalParameter(
                f"{prefix}{expert}.down.weight",
                shape,
                self.to_residual,
                1,
                decay=True,
                of_expert=True,
            )
            outwards.append(
                Part(logical, Box((0, first), (hidden, width)), hidden * len(outwards))
            )
        self.found.append(
            LocalParameter(
                f"{prefix}{fused}.weight", (width * len(inwards), hidden), tuple(inwards)
            )
        )
        self.found.append(
            LocalParameter(f"{prefix}down.weight", (hidden * each, width), tuple(outwards))
        )

    def _norm(self, name: str, width: int | None = None, *, of_heads: bool = False) -> None:
        """Of the residual stream, of a latent `width` wide, or of heads."""
        shape = (width or self.model.hidden_size,)
        self._replicated(
            name + ".weight",
            shape,
            Init("zeros" if self.model.zero_centered_norm else "ones"),
            decay=False,
            partial=of_heads,
        )
        if self.model.norm == "layernorm":
            self._replicated(
                name + ".bias", shape, Init("zeros"), decay=False, partial=of_heads
            )

    def _replicated(
        self,
        name: str,
        shape: tuple[int, ...],
        init: Init,
        *,
        decay: bool,
        partial: bool = False,
    ) -> None:
        """`partial`: each tp rank has a part of the gradient, whether or not tokens are
        cut.
        """
        logical = LogicalParameter(
            name, shape, init, None, decay, sum_over_tp=self.sequence_parallel or partial
        )
        self.found.append(
            LocalParameter(name, shape, (Part(logical, Box((0,) * len(shape), shape), 0),))
        )

    def _vocabulary(
        self,
        name: str,
        logical_name: str = "",
        *,
        is_shared_embedding: bool = False,
        owns_norm: bool = True,
    ) -> None:
        rows = self.model.vocabulary
        hidden = self.model.hidden_size
        local = padded_vocabulary(self.model, self.tp) // self.tp
        first = min(self.tp_rank * local, rows)
        held = min(first + local, rows) - first
        logical = LogicalParameter(
            logical_name or name, (rows, hidden), self.normal, 0, decay=True
        )
        part = Part(logical, Box((first, 0), (held, hidden)), 0)
        self.found.append(
            LocalParameter(name, (local, hidden), (part,), is_shared_embedding, owns_norm)
        )

    def _column(
        self,
        fused: str,
        outputs: dict[str, tuple[int, int]],
        inputs: int,
        prefix: str,
        *,
        bias: bool,
    ) -> None:
        """Output rows cut over tp; several logical tensors lie one after another.

        `outputs`: rows, and how many ranks share each part.
        """
        weights = []
        biases = []
        start = 0
        for name, (out, num_kv_replicas) in outputs.items():
            rows = self._cut(prefix + name, out * num_kv_replicas)
            first = rows * (self.tp_rank // num_kv_replicas)
            owns_norm = self.tp_rank % num_kv_replicas == 0
            weight = LogicalParameter(
                f"{prefix}{name}.weight", (out, inputs), self.normal, 0, decay=True
            )
            weights.append(
                Part(
                    weight,
                    Box((first, 0), (rows, inputs)),
                    start,
                    num_kv_replicas,
                    owns_norm,
                )
            )
            of_part = LogicalParameter(
                f"{prefix}{name}.bias", (out,), Init("zeros"), 0, decay=False
            )
            biases.append(
                Part(of_part, Box((first,), (rows,)), start, num_kv_replicas, owns_norm)
            )
            start += rows
        self.found.append(
            LocalParameter(fused + ".weight", (start, inputs), tuple(weights))
        )
        if bias:
            self.found.append(LocalParameter(fused + ".bias", (start,), tuple(biases)))

    def _row(self, name: str, outputs: int, inputs: int) -> None:
        """Input columns cut over tp; the bias is whole on every rank and added after
        the reduction.
        """
        columns = self._cut(name, inputs)
        weight = LogicalParameter(
            name + ".weight", (outputs, inputs), self.to_residual, 1, decay=True
        )
        box = Box((0, columns * self.tp_rank), (outputs, columns))
        self.found.append(
            LocalParameter(name + ".weight", (outputs, columns), (Part(weight, box, 0),))
        )
        if self.model.linear_bias:
            self._replicated(name + ".bias", (outputs,), Init("zeros"), decay=False)

    def _cut(self, name: str, size: int) -> int:
        if size % self.tp:
            raise ValueError(f"{name}: {size} is not divisible by tp={self.tp}")
        return size // self.tp
