"""Defines the network settings of a job.

Owns: which of NCCL's and gloo's settings a spec may choose: a closed set, no environment
variables. Must not know: torch, process groups.
"""

from pydantic import Field

from megatron_ray.config.base import Config


class NcclGroupConfig(Config):
    """Options of the NCCL communicators of one parallel axis."""

    min_ctas: int | None = Field(default=None, ge=1, le=64)
    """Least number of thread blocks (CTAs) that NCCL uses for a collective. Default:
    chosen by NCCL."""
    max_ctas: int | None = Field(default=None, ge=1, le=64)
    """Largest number of thread blocks (CTAs) that NCCL uses for a collective. Fewer leave
    more of the GPU to products that run beside it. Default: chosen by NCCL."""
    high_priority_stream: bool = False
    """Whether collectives run on a stream that goes before products on the GPU."""


class NcclConfig(Config):
    """Options of NCCL by parallel axis."""

    tp: NcclGroupConfig = NcclGroupConfig()
    """Tensor parallel groups."""
    cp: NcclGroupConfig = NcclGroupConfig()
    """Context parallel groups."""
    pp: NcclGroupConfig = NcclGroupConfig()
    """Pipeline parallel groups, and those of tied embeddings."""
    dp: NcclGroupConfig = NcclGroupConfig()
    """Data parallel groups, which reduce gradients and gather weights."""
    ep: NcclGroupConfig = NcclGroupConfig()
    """Expert parallel groups, which carry tokens to their experts."""


class NetworkConfig(Config):
    """How ranks reach each other."""

    interface: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$"
    )
    """Network interface of NCCL and gloo on every node, such as `eth0` or `bond0`.
    Default: for gloo the interface of the node's address in Ray, for NCCL its own
    choice."""
    collective_timeout_s: float = Field(default=600.0, ge=1, le=86400)
    """Seconds after which a collective that some rank has not joined fails the attempt."""
    first_step_timeout_s: float = Field(default=600.0, ge=1, le=86400)
    """The same until the end of an attempt's first step, while ranks load weights and
    compile; at least collective_timeout_s. On CPU, messages between two ranks keep it."""
    nccl: NcclConfig = NcclConfig()
    """Options of NCCL by parallel axis; without effect on CPU. Axes with the same ranks
    share a group, which has the options of the first of them in this order: cp, dp, tp,
    pp, ep."""

    @property
    def start_timeout_s(self) -> float:
        """Timeout of collectives until the end of the first step."""
        return max(self.first_step_timeout_s, self.collective_timeout_s)
