"""Waits for gathered weights where a forward pass first reads them.

Owns: the gathers that are running, by bucket, and the hooks that wait for them. Must not
know: what starts a gather, the optimizer.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from megatron_ray.distributed.collectives import Pending
from megatron_ray.sharding.buckets import Bucket, BucketPlan


class WeightGathers:
    """The running gathers of one set of buffers."""

    def __init__(self) -> None:
        self._running: dict[int, Pending] = {}

    def start(self, bucket: Bucket, gather: Pending) -> None:
        """Adds the gather of a bucket, which must not have another one."""
        self._running[bucket.index] = gather

    def wait(self, buckets: Sequence[int]) -> None:
        """Waits for the buckets with these indices."""
        # Most calls come after the first microbatch, when nothing runs.
        if not self._running:
            return
        for index in buckets:
            gather = self._running.pop(index, None)
            if gather is not None:
                gather.wait()

    def wait_for_all(self) -> None:
        """Waits for every bucket."""
        self.wait(tuple(self._running))


def wait_in_forward(model: nn.Module, plan: BucketPlan, gathers: WeightGathers) -> None:
    """Makes each layer of a model wait for its own buckets before its forward pass."""
    bucket_of = {}
    for bucket in plan.buckets:
        for placed in bucket.placed:
            bucket_of[placed.parameter.name] = bucket.index
    # A tied weight has one name and two modules.
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        buckets = set()
        for parameter in module.parameters(recurse=False):
            name = names[parameter]
            if name in bucket_of:
                buckets.add(bucket_of[name])
        if buckets:
            # Forward order is the reverse of the buckets'.
            hook = partial(_wait, gathers, sorted(buckets, reverse=True))
            module.register_forward_pre_hook(hook)


def _wait(
    gathers: WeightGathers, buckets: Sequence[int], module: nn.Module, args: object
) -> None:
    gathers.wait(buckets)
