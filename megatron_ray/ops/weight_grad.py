"""Where weight gradients go.

Owns: accumulation into fp32 main gradients, and saying that one is complete.

A layer's backward computes only the input gradient and hands (input, output gradient)
to its slot; the sink behind the slot decides whether to multiply now or later, and
counts the microbatches. So buckets, accumulation fusion and zero-bubble schedules share
one mechanism, and autograd hooks have no part in it. Must not know: buckets' layout,
groups, schedules.

Shapes: T tokens, I inputs, O outputs, E experts.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ray.ops.matmul import (
    Counts,
    accumulate_grouped_weight_grad,
    accumulate_weight_grad,
)


@dataclass(eq=False)
class GradSlot:
    """The fp32 main gradient of one parameter and its state within a step."""

    name: str
    main_grad: Tensor
    sink: "WeightGradSink"
    uses: int = 1
    """Contributions per microbatch: 2 for a tied embedding, more where further tokens
    are predicted."""
    fresh: bool = True
    """Nothing accumulated yet in this step: the first contribution overwrites, so that
    nobody needs to clear the buffer."""
    seen: int = field(default=0)
    """Contributions of the last microbatch so far."""

    @property
    def puts_off(self) -> bool:
        """Whether what is added now is computed later."""
        return self.sink.puts_off

    def linear(self, inputs: Tensor | Callable[[], Tensor], grad_TO: Tensor) -> None:
        """Adds grad^T @ inputs, the gradient of a [O, I] weight.

        Inputs [T, I] that are called come when the product is computed.
        """
        self.sink.linear(self, inputs, grad_TO)

    def grouped(
        self, inputs_TI: Tensor, grad_TO: Tensor, counts: Counts, num_experts: int
    ) -> None:
        """Adds expert by expert grad^T @ inputs to a [E x O, I] weight; each expert's
        rows lie together, in the order of experts.
        """
        self.sink.grouped(self, inputs_TI, grad_TO, counts, num_experts)

    def add(self, gradient: Tensor) -> None:
        """Adds a gradient computed by the caller."""
        self.sink.add(self, gradient)

    def add_rows(self, rows_T: Tensor, grad_TI: Tensor) -> None:
        """Adds each row of `grad_TI` to the row of the main gradient that `rows_T`
        names (an embedding's gradient).
        """
        self.sink.add_rows(self, rows_T, grad_TI)


class WeightGradSink:
    """Accumulates at once, or later where a schedule puts that off.

    `on_ready` is called with a slot when its gradient of the whole step is complete.
    """

    def __init__(self, on_ready: Callable[[GradSlot], None]) -> None:
        self._on_ready = on_ready
        self._last_microbatch = False
        self._put_off: list[Callable[[], None]] | None = None
        self._later: dict[object, list[Callable[[], None]]] = defaultdict(list)
        self.slots: dict[str, GradSlot] = {}

    def register(self, name: str, main_grad: Tensor, uses: int = 1) -> GradSlot:
        """Makes the slot of one trainable parameter; frozen ones get none."""
        slot = GradSlot(name, main_grad, self, uses)
        self.slots[name] = slot
        return slot

    def begin_step(self) -> None:
        """Forgets the gradients of the previous step."""
        for slot in self.slots.values():
            slot.fresh = True
            slot.seen = 0
        self._last_microbatch = False
        self._put_off = None
        self._later.clear()

    def begin_microbatch(self, *, last: bool) -> None:
        """Announces a microbatch; only in the last one gradients become ready."""
        self._last_microbatch = last
        self._put_off = None

    def put_off(self, key: object) -> None:
        """Announces a microbatch whose weight products are computed later, by
        `catch_up` with the same key.
        """
        self._put_off = self._later[key]

    @torch.no_grad()
    def catch_up(self, key: object) -> None:
        """Computes what was put off, of the microbatch that was announced."""
        for work in self._later.pop(key, ()):
            work()

    @property
    def puts_off(self) -> bool:
        """Whether weight products of the announced microbatch are computed later."""
        return self._put_off is not None

    def linear(
        self, slot: GradSlot, inputs: Tensor | Callable[[], Tensor], grad_TO: Tensor
    ) -> None:
        """grad^T @ inputs into the main gradient."""
        self._now_or_later(lambda: self._linear(slot, inputs, grad_TO))

    def grouped(
        self,
        slot: GradSlot,
        inputs_TI: Tensor,
        grad_TO: Tensor,
        counts: Counts,
        num_experts: int,
    ) -> None:
        """grad^T @ inputs of each expert into its part of the main gradient."""
        self._now_or_later(
            lambda: self._grouped(slot, inputs_TI, grad_TO, counts, num_experts)
        )

    def add(self, slot: GradSlot, gradient: Tensor) -> None:
        """A ready-made gradient into the main gradient."""
        self._now_or_later(lambda: self._add(slot, gradient))

    def add_rows(self, slot: GradSlot, rows_T: Tensor, grad_TI: Tensor) -> None:
        """Scattered rows into the main gradient."""
        self._now_or_later(lambda: self._add_rows(slot, rows_T, grad_TI))

    def _now_or_later(self, work: Callable[[], None]) -> None:
        if self._put_off is None:
            work()
        else:
            self._put_off.append(work)

    def _linear(
        self, slot: GradSlot, inputs: Tensor | Callable[[], Tensor], grad_TO: Tensor
    ) -> None:
        inputs_TI = inputs if isinstance(inputs, Tensor) else inputs()
        accumulate_weight_grad(slot.main_grad, grad_TO, inputs_TI, fresh=slot.fresh)
        self._done(slot)

    def _grouped(
        self,
        slot: GradSlot,
        inputs_TI: Tensor,
        grad_TO: Tensor,
        counts: Counts,
        num_experts: int,
    ) -> None:
        main_EOI = slot.main_grad.view(num_experts, -1, slot.main_grad.shape[1])
        accumulate_grouped_weight_grad(
            main_EOI, grad_TO, inputs_TI, counts, fresh=slot.fresh
        )
        self._done(slot)

    def _add(self, slot: GradSlot, gradient: Tensor) -> None:
        self._accumulate(slot, gradient)
        self._done(slot)

    def _add_rows(self, slot: GradSlot, rows_T: Tensor, grad_TI: Tensor) -> None:
        if slot.fresh:
            slot.main_grad.zero_()
        slot.main_grad.index_add_(0, rows_T, grad_TI.to(slot.main_grad.dtype))
        self._done(slot)

    def _accumulate(self, slot: GradSlot, gradient: Tensor) -> None:
        if slot.fresh:
            slot.main_grad.copy_(gradient)
        else:
            slot.main_grad.add_(gradient)

    def _done(self, slot: GradSlot) -> None:
        slot.fresh = False
        if self._last_microbatch:
            slot.seen += 1
            if slot.seen == slot.uses:
                self._on_ready(slot)
