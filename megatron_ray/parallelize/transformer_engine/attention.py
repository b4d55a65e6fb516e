"""Computes attention over whole sequences by the library, which has flash and fused kernels.

Must not know: projections, ranks.

Shapes: B batch, S sequence, T = B x S tokens, N query heads, G key/value heads, D head
width.
"""

from typing import Any

from torch import Tensor

from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.batch import Packed
from megatron_ray.parallelize.replaced_forward import replace_forward
from megatron_ray.parallelize.transformer_engine.library import TransformerEngine


def compute_attention(engine: TransformerEngine, layer: LocalAttention) -> None:
    """Makes the library compute a layer: (q [B, N, S, D], k, v, documents) -> [B, N, S, D]."""
    replace_forward(layer, _Attention(engine, layer.window).run)


class _Attention:
    """Causal attention, over whole sequences or their last `window` tokens."""

    def __init__(self, engine: TransformerEngine, window: int | None) -> None:
        self.engine = engine
        # Tokens before and after a token; -1: all.
        self.window_size = (-1, 0)
        if window is not None:
            self.window_size = (window - 1, 0)
        self.core: Any = None

    def run(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None
    ) -> Tensor:
        """Returns [B, N, S, D]; within documents if `packed`."""
        batch, heads, length, width = q_BNSD.shape
        if self.core is None:
            self.core = self._make_core(heads, k_BGSD.shape[1], width)
        q = q_BNSD.transpose(1, 2)
        k = k_BGSD.transpose(1, 2)
        v = v_BGSD.transpose(1, 2)
        if packed is None:
            attended = self.core(q, k, v, qkv_format="bshd", window_size=self.window_size)
        else:
            attended = self._attend_in_documents(q, k, v, packed)
        by_head: Tensor = attended.view(batch, length, heads, width).transpose(1, 2)
        return by_head

    def _make_core(self, heads: int, groups: int, width: int) -> Any:
        # Here and not earlier, because only the tensors say how many heads a rank has.
        return self.engine.pytorch.DotProductAttention(
            heads, width, num_gqa_groups=groups, attn_mask_type="causal"
        )

    def _attend_in_documents(
        self, q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, packed: Packed
    ) -> Tensor:
        # All samples become one row of documents.
        attended: Tensor = self.core(
            q_BSND.flatten(0, 1),
            k_BSGD.flatten(0, 1),
            v_BSGD.flatten(0, 1),
            qkv_format="thd",
            cu_seqlens_q=packed.cu_seqlens,
            cu_seqlens_kv=packed.cu_seqlens,
            max_seqlen_q=packed.longest,
            max_seqlen_kv=packed.longest,
            attn_mask_type="padding_causal",
            window_size=self.window_size,
        )
        return attended
