"""Counts what tensor-parallel layers send for one microbatch.

Pure. Must not know: torch, which layers a model has.

Letters as in `activations`: T tokens of a microbatch on a context-parallel rank, t = T
/ tp under sequence parallelism, else T.
"""

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.microbatch import own_tokens_of, tokens_of, width_of
from megatron_ray.planning.tally import Axis, Kind, Tally

_FP32 = 4


class TensorParallelCommunication:
    """Adds the collectives of tensor-parallel layers to a tally."""

    def __init__(self, config: TrainConfig, tally: Tally) -> None:
        self.config = config
        self.model = config.model
        self.parallel = config.parallel
        self.tally = tally
        self.width = width_of(config)
        """Bytes of an element."""
        self.tokens = tokens_of(config)
        """T"""
        self.own_tokens = own_tokens_of(config)
        """t"""
        self.hidden = config.model.hidden_size
        """H"""
        self._overlaps = self.parallel.tp_comm_overlap and self.parallel.sequence_parallel
        self._defers_weight_grads = (
            self.parallel.pp > 1 and self.parallel.schedule.startswith("zb")
        )
        self._reduces_scales = False
        # Weights that are gathered in FP8 come with their scales.
        self._weight = int(tally.sizes["shard"] == 1 or not config.training.gathers_in_fp8)

    # ---- FP8 with a scale for each tensor: the largest values of all its parts, fp32

    def has_scales(self, layer: int) -> bool:
        """Returns whether the products of a layer reduce the scales of tensors."""
        fp8 = self.config.training.fp8
        if fp8 is None or fp8.recipe != "current":
            return False
        return fp8.covers(layer, self.model.num_layers)

    def enter(self, layer: int) -> None:
        """Begins with a layer, to which everything belongs until the next one."""
        self._reduces_scales = self.has_scales(layer)

    def _reduce_scales(self, axis: Axis, operands: int, times: int = 1) -> None:
        """Adds one all-reduce for so many operands of a product, `times` over."""
        if self._reduces_scales:
            self.tally.add(axis, "all_reduce", _FP32 * operands, times)

    def mtp_projection(self, layer: int) -> None:
        """Adds the projection before an MTP layer, forward and backward."""
        self.enter(layer)
        self._replicated()
        self._replicated()

    def _replicated(self) -> None:
        """Adds ReplicatedLinear, forward or backward: it has a rank's own tokens."""
        self._reduce_scales("tp", 1)

    # ---- tensor parallelism: Megatron-LM's f and g, and their sequence-parallel forms
    # (Korthikanti et al. 2022, section 4.2.2)

    def _gather_tokens(self, features: int) -> None:
        """Adds the all-gather of [t, features] activations, if tokens are split."""
        if self.parallel.sequence_parallel:
            self.tally.add("tp", "all_gather", self.own_tokens * features * self.width)

    def _sum_over_tp(self, features: int) -> None:
        """Adds the sum over tp of [T, features] partial results.

        With sequence parallelism each rank keeps the sums of its own tokens only.
        """
        kind: Kind = "all_reduce"
        if self.parallel.sequence_parallel:
            kind = "reduce_scatter"
        self.tally.add("tp", kind, self.tokens * features * self.width)

    def _gather_and_multiply(self, features: int) -> None:
        """Adds the gather of [t, features] that the product of all tokens needs."""
        if self._overlaps:
            self._exchange_tokens(features)
        else:
            self._gather_tokens(features)

    def _multiply_and_sum(self, features: int) -> None:
        """Adds the sum over tp of products [T, features]."""
        if self._overlaps:
            self._exchange_tokens(features)
        else:
            self._sum_over_tp(features)

    def _exchange_tokens(self, features: int) -> None:
        """Adds the messages of `tensor_parallel.overlap`: each has one rank's tokens."""
        size = self.own_tokens * features * self.width
        self.tally.add("tp", "send", size, self.parallel.tp - 1)

    def _column_parallel_forward(self, features: int) -> None:
        self._gather_and_multiply(features)
        self._reduce_scales("tp", self._weight)

    def _column_parallel_backward(self, features: int) -> None:
        # Gathered inputs are not kept: the weight gradient gathers them again.
        self._gather_tokens(features)
        self._reduce_scales("tp", 1)  # the gradient
        if self._defers_weight_grads:
            self._multiply_and_sum(features)
        else:
            # Overlaps with the product of the weight gradient.
            self._sum_over_tp(features)

    def _row_parallel_forward(self) -> None:
        self._reduce_scales("tp", 1 + self._weight)  # inputs and weight
        self._multiply_and_sum(self.hidden)

    def _row_parallel_backward(self) -> None:
        self._gather_and_multiply(self.hidden)

    def embedding(self) -> None:
        """Adds VocabParallelEmbedding, forward and backward."""
        self._sum_over_tp(self.hidden)
        self._gather_tokens(self.hidden)

    def head(self) -> None:
        """Adds VocabParallelHead with its loss, forward and backward."""
        self._gather_and_multiply(self.hidden)
        # Softmax over a vocabulary that is split over tp, in fp32: first the largest
        # logit of each token, then the sum of exponentials and the label's logit.
        self.tally.add("tp", "all_reduce", _FP32 * self.tokens)
        self.tally.add("tp", "all_reduce", 2 * _FP32 * self.tokens)
        self._sum_over_tp(self.hidden)
