"""Defines the module that ring and all-gather attention share.

Must not know: how keys and values reach a rank.
"""

from torch import Tensor, nn

from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.models.batch import Packed
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.dtypes import precision_of


class ContextParallelAttention(nn.Module):
    """(q [B, N, S, D], k and v [B, G, S, D]) -> causal attention [B, N, S, D].

    Queries attend to the sequences of the whole group. Subclasses name the `kernel`,
    which is called with (q, k, v, documents, group, window, in_fp32).
    """

    kernel: type[AutogradFunction[Tensor]]

    def __init__(self, group: Group, device: DeviceKind, window: int | None = None) -> None:
        """Creates it for ranks on such devices.

        `window`: tokens that a token attends to, itself included; None for all.
        """
        super().__init__()
        self.group = group
        self.device = device
        self.window = window

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None
    ) -> Tensor:
        """Returns the attention outputs [B, N, S, D], within documents if `packed`."""
        documents = None
        if packed is not None:
            documents = packed.documents_BS
        in_fp32 = self.device.needs_fp32(precision_of(q_BNSD.dtype))
        return self.kernel.apply(
            q_BNSD, k_BGSD, v_BGSD, documents, self.group, self.window, in_fp32
        )
