"""Defines how a model is spread over ranks.

Owns: the degrees of parallelism. Must not know: nodes, GPUs, the model.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ray.config.base import Config
from megatron_ray.config.local_sgd import LocalSGDConfig


class ParallelismConfig(Config):
    """Degrees of the parallel axes; a job has tp x cp x dp x pp ranks."""

    tp: int = Field(default=1, ge=1, le=1024)
    """Tensor parallel size: ranks that split the matrices of every layer. Should not
    exceed the number of GPUs in a node."""
    pp: int = Field(default=1, ge=1, le=1024)
    """Pipeline parallel size: ranks that split the layers into stages."""
    vpp: int = Field(default=1, ge=1, le=64)
    """Virtual pipeline size: model chunks per pipeline rank. More chunks shorten the
    pipeline bubble and add communication."""
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = "auto"
    """Order of forward and backward passes in the pipeline. `auto` is `1f1b`, or
    `interleaved` when vpp > 1. `zb-h1` (zero bubble) delays weight gradients to times at
    which a rank would wait; `zb-v` does too and needs vpp=2, with stages that go down
    the ranks and back up."""
    layout: str | None = Field(default=None, max_length=4096)
    """Contents of each pipeline stage in Megatron's notation, such as
    `Et*3|(tt|)*29,m|L`: E embedding, t layer, m multi-token prediction layer, L head and
    loss, | end of a stage, *n repetition. Default: equal numbers of layers."""
    first_stage_layers: int | None = Field(default=None, ge=0, le=1 << 40)
    """Number of layers of the first stage. Default: as many as the other stages."""
    last_stage_layers: int | None = Field(default=None, ge=0, le=1 << 40)
    """Number of layers of the last stage. Default: as many as the other stages."""
    cp: int = Field(default=1, ge=1, le=1024)
    """Context parallel size: ranks that split each sequence, for long sequences."""
    cp_method: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    """How context-parallel ranks compute attention: `p2p` passes keys and values around
    a ring, `all_gather` gathers them, `a2a` exchanges heads for tokens (Ulysses),
    `a2a+p2p` exchanges heads among neighbours inside a ring."""
    hierarchical_cp_sizes: tuple[int, int] | None = None
    """For `a2a+p2p`: the number of ranks that exchange heads, and the number of such
    groups in the ring. Their product must be cp."""
    ep: int = Field(default=1, ge=1, le=4096)
    """Expert parallel size: ranks that split the experts of each layer."""
    etp: int | None = Field(default=None, ge=1, le=1024)
    """Tensor parallel size inside an expert. Default: tp."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts: `alltoall` sends each token to the ranks that own
    its experts, `allgather` sends all tokens to all ranks of the expert group, which
    communicates more but in fewer, larger messages."""
    ep_comm_overlap: bool = False
    """With dispatcher=alltoall: interleaves the forward pass of a microbatch with the
    backward pass of an earlier one, and computes one while tokens of the other are on their
    way to experts and back. Activations of more microbatches are kept. No number changes.
    Has no effect at ep=1."""
    dp: Annotated[int, Field(ge=1, le=1 << 20)] | Literal["auto"] = "auto"
    """Data parallel size: replicas that split the batch. `auto` takes the most that fit
    the cluster and divide the batch. Where an autoscaler adds nodes, that is the most that
    fit the nodes that are there at submission, or else the fewest that the job can run
    with, on new nodes; a number may use all nodes that the cluster may grow to."""
    sequence_parallel: bool = False
    """Splits activations between tensor-parallel regions along the sequence, which saves
    memory at the same communication volume. Has no effect at tp=1."""
    tp_comm_overlap: bool = False
    """With sequence_parallel: multiplies a rank's own tokens while those of others arrive, and
    sends the sums of one rank's tokens while those of the next are computed. Has no effect
    at tp=1."""
    tp_symmetric_memory: bool = False
    """With tp_comm_overlap, on GPUs of one node: tokens are copied from the memory of one
    GPU to that of another (torch's symmetric memory), while all processors of the GPUs
    compute products. No number changes."""
    zero: Literal[0, 1, 3] = 1
    """ZeRO stage: 0 shards nothing, 1 shards the optimizer state over the data-parallel
    ranks, 3 shards weights and gradients too."""
    zero_replicas: int = Field(default=1, ge=1, le=1 << 40)
    """For zero=3: number of copies of the sharded state (hybrid sharding, HSDP). Each
    copy is sharded over dp x cp / zero_replicas ranks."""
    overlap_param_gather: bool = False
    """With zero=1: gathers updated weights during the next forward pass, where each layer
    waits for its own, instead of all of them before it. No number changes."""
    local_sgd: LocalSGDConfig | None = None
    """Splits the replicas into groups that synchronize every few steps (local SGD, DiLoCo,
    DES-LOC), for slow links between them. Default: all replicas take each step
    together."""
    order: str = "tp-cp-ep-dp-pp"
    """Order of the axes in the rank numbering: the first axis has neighbouring ranks,
    the last has those farthest apart. Default: Megatron's."""
    bucket_elements: int | None = Field(default=None, ge=1, le=1 << 40)
    """Approximate number of gradient elements per reduction bucket. Default: max(40e6,
    1e6 x dp) as in Megatron, and in small models an eighth of the parameters but at
    least 1e6 x dp."""

    @property
    def expert_tp(self) -> int:
        """Tensor parallel size inside an expert, resolved."""
        return self.etp or self.tp

    @property
    def interleaves_passes(self) -> bool:
        """Whether forward passes are interleaved with backward passes."""
        return self.ep_comm_overlap and self.ep > 1

    @property
    def replica_groups(self) -> int:
        """Number of groups of this job's replicas that take steps by themselves."""
        if self.local_sgd is None:
            return 1
        return self.local_sgd.groups_in_job

    @property
    def sync_groups(self) -> int:
        """Number of groups that synchronize, in this job and in others."""
        if self.local_sgd is None:
            return 1
        return self.local_sgd.groups

    @property
    def jobs(self) -> int:
        """Jobs that train together, each on its own part of the samples."""
        if self.local_sgd is None:
            return 1
        return self.local_sgd.jobs

    @property
    def job_index(self) -> int:
        """This job's index among them."""
        if self.local_sgd is None:
            return 0
        return self.local_sgd.job_index

    @property
    def outer_copies(self) -> int:
        """Copies of the parameters that an outer optimizer keeps."""
        if self.local_sgd is None:
            return 0
        return self.local_sgd.outer_copies
