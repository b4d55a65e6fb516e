"""Accumulates weight gradients into main gradients, at once or later.

A layer's backward computes its input gradient itself and contributes the computation of
its weight gradient to the slot of that weight. The sink of the slots runs the
computation at once, or stores it if a zero-bubble schedule defers it, and counts
contributions to detect when the gradient of a step is complete. Buckets, accumulation
and zero-bubble schedules thus share one mechanism, without autograd hooks. Must not
know: products, the layout of buckets, groups, schedules.

The order of calls in a step, which the sink checks:

    begin_step
    for every microbatch of every stage on this rank, one of
        begin_microbatch(last=...)                     then a backward pass
        begin_microbatch(last=False, defer_to=key)     then a backward pass, and later
        run_deferred(key, last=...)
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Accumulate(Protocol):
    """Computes a weight gradient into a main gradient.

    It overwrites a fresh gradient and adds to any other.
    """

    def __call__(self, main_grad: Tensor, /, *, fresh: bool) -> None:
        """Accumulates into `main_grad`."""
        ...


@dataclass(eq=False)
class GradSlot:
    """The main gradient of a parameter and its state within a step."""

    name: str
    main_grad: Tensor
    sink: "WeightGradSink"
    uses: int = 1
    """Contributions per microbatch: 2 for a tied embedding, more with MTP layers."""
    fresh: bool = True
    """Whether nothing has been accumulated in this step. The first contribution
    overwrites, so the buffer is never cleared."""
    num_final: int = 0
    """Number of contributions of the last microbatch so far."""

    @property
    def is_deferred(self) -> bool:
        """Whether contributions are currently deferred."""
        return self.sink.is_deferring

    def contribute(self, accumulate: Accumulate) -> None:
        """Contributes one computation of this gradient."""
        self.sink.contribute(self, accumulate)


@dataclass(frozen=True)
class _Microbatch:
    """The microbatch of the running backward pass."""

    is_last: bool
    deferred: list[Callable[[], None]] | None
    """Collects deferred computations; None to run them at once."""


class WeightGradSink:
    """Runs contributed computations and reports complete gradients.

    `on_ready` is called with a slot when its gradient of the whole step is complete.
    """

    def __init__(self, on_ready: Callable[[GradSlot], None]) -> None:
        self._on_ready = on_ready
        self._microbatch: _Microbatch | None = None
        self._deferred: dict[Hashable, list[Callable[[], None]]] = defaultdict(list)
        self.slots: dict[str, GradSlot] = {}

    def register(self, name: str, main_grad: Tensor, uses: int = 1) -> GradSlot:
        """Creates the slot of a trainable parameter; frozen ones have none."""
        slot = GradSlot(name, main_grad, self, uses)
        self.slots[name] = slot
        return slot

    def begin_step(self) -> None:
        """Marks all gradients as fresh for a new step."""
        for slot in self.slots.values():
            slot.fresh = True
            slot.num_final = 0
        # Computations that were deferred but never run belong to a failed step.
        self._microbatch = None
        self._deferred.clear()

    def begin_microbatch(self, *, last: bool, defer_to: Hashable | None = None) -> None:
        """Announces the backward pass of a microbatch.

        Gradients become ready in the `last` one only. With `defer_to` its computations
        are stored until `run_deferred` is called with this key.
        """
        # A schedule interleaves chunks and microbatches, so several keys may be open.
        deferred = None
        if defer_to is not None:
            deferred = self._deferred[defer_to]
        self._microbatch = _Microbatch(last, deferred)

    @torch.no_grad()
    def run_deferred(self, key: Hashable, *, last: bool) -> None:
        """Runs the computations deferred to a key; `last` as in `begin_microbatch`."""
        self.begin_microbatch(last=last)
        for compute in self._deferred.pop(key, ()):
            compute()

    @property
    def is_deferring(self) -> bool:
        """Whether computations of the current microbatch are deferred."""
        return self._microbatch is not None and self._microbatch.deferred is not None

    def contribute(self, slot: GradSlot, accumulate: Accumulate) -> None:
        """Runs a computation of a slot's gradient, or stores it for `run_deferred`.

        Raises RuntimeError before the step's first `begin_microbatch`.
        """
        if self._microbatch is None:
            raise RuntimeError(
                f"{slot.name}: a gradient came before begin_microbatch was called"
            )
        if self._microbatch.deferred is None:
            self._run(slot, accumulate)
        else:
            self._microbatch.deferred.append(lambda: self._run(slot, accumulate))

    def _run(self, slot: GradSlot, accumulate: Accumulate) -> None:
        accumulate(slot.main_grad, fresh=slot.fresh)
        # A flag instead of a cleared buffer marks the first contribution of a step, which
        # saves a pass over all gradients.
        slot.fresh = False
        # Read here, not in `contribute`, because `run_deferred` sets the microbatch of a
        # deferred computation.
        assert self._microbatch is not None
        if not self._microbatch.is_last:
            return
        slot.num_final += 1
        if slot.num_final > slot.uses:
            raise RuntimeError(
                f"{slot.name}: a gradient came after the last one of the step, "
                "begin_step was not called"
            )
        if slot.num_final == slot.uses:
            self._on_ready(slot)
