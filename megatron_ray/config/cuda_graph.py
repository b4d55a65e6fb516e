"""Defines when the passes of a step are recorded in a CUDA graph.

Must not know: what a recording excludes (`validation.passes.cuda_graph`).
"""

from pydantic import Field

from megatron_ray.config.base import Config


class CudaGraphConfig(Config):
    """A CUDA graph of the forward and backward passes of whole steps.

    As with Megatron's `--cuda-graph-scope full_iteration` the passes of all microbatches are
    recorded once, with the reductions of gradients, and then replayed in every step; sums
    over the step, clipping and the update follow as usual. It helps where the host launches
    kernels more slowly than the GPU runs them: small models, or small parts of large ones.
    On CPUs, which record nothing, the same code runs the passes again.
    """

    warmup_steps: int = Field(default=3, ge=1, le=1 << 20)
    """Steps of each process before the passes are recorded, in which libraries allocate
    their memory and ranks connect. After a resume there are as many again."""
