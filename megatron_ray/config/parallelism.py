"""How a model is spread over ranks.

Owns: degrees. Must not know: nodes, GPUs, the model.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ray.config.base import Config


class ParallelismConfig(Config):
    """Degrees of each parallel axis; the world is tp x cp x dp x pp ranks."""

    tp: int = Field(default=1, ge=1, le=1024)
    """Tensor parallel: ranks that share every layer's matrices."""
    pp: int = Field(default=1, ge=1, le=1024)
    """Pipeline parallel: stages of layers."""
    vpp: int = Field(default=1, ge=1, le=64)
    """Virtual stages (model chunks) per pipeline rank."""
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = "auto"
    """Order of the pipeline's forward and backward passes; `auto` is 1f1b, interleaved
    where vpp is above 1. `zb-h1` computes weight gradients apart, when a rank would
    wait; so does `zb-v`, with vpp=2 chunks per rank whose stages go down the ranks and
    back."""
    layout: str | None = Field(default=None, max_length=4096)
    """Parts of each stage in Megatron's words, `Et*3|(tt|)*29,m|L`; equal numbers of
    layers when not given."""
    first_stage_layers: int | None = Field(default=None, ge=0)
    """Layers of the first stage, where they are not as many as those of the others."""
    last_stage_layers: int | None = Field(default=None, ge=0)
    """Layers of the last stage, likewise."""
    cp: int = Field(default=1, ge=1, le=1024)
    """Context parallel: ranks that share one sequence."""
    cp_method: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    """How they attend to each other's tokens: keys and values in a ring, gathered,
    heads exchanged for tokens, or an exchange among neighbours inside a ring."""
    hierarchical_cp_sizes: tuple[int, int] | None = None
    """For a2a+p2p: how many ranks exchange heads, and how many such groups make up the
    ring; their product is cp."""
    ep: int = Field(default=1, ge=1, le=4096)
    """Expert parallel: ranks that share the experts of a mixture."""
    etp: int | None = Field(default=None, ge=1, le=1024)
    """Tensor parallel degree inside an expert; tp when not given."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens get to their experts: each to the ranks that hold them, which moves
    less, or all tokens to all ranks, of which every one picks its own."""
    dp: Annotated[int, Field(ge=1, le=1 << 20)] | Literal["auto"] = "auto"
    """Data parallel replicas; `auto` takes as many as the cluster has room for and the
    batch divides into."""
    sequence_parallel: bool = False
    """Cuts activations between tensor-parallel regions along the sequence; has no
    meaning, and resolves to false, at tp=1."""
    zero: Literal[0, 1, 3] = 1
    """ZeRO stage: 1 shards the optimizer state over the data-parallel ranks, 3 the
    weights and gradients too, 0 nothing."""
    zero_replicas: int = Field(default=1, ge=1)
    """For ZeRO 3: how many copies of the sharded state there are (HSDP); the dp x cp
    ranks divided by this share one."""
    order: str = "tp-cp-ep-dp-pp"
    """Axes from the one whose ranks are neighbours to the one whose ranks are farthest
    apart."""
    bucket_elements: int | None = Field(default=None, ge=1)
    """Gradients are reduced in buckets of about this many elements; when not given
    Megatron's max(40e6, 1e6 x dp), and in small models an eighth of all but at least
    1e6 x dp."""

    @property
    def expert_tp(self) -> int:
        """`etp`, resolved."""
        return self.tp if self.etp is None else self.etp
