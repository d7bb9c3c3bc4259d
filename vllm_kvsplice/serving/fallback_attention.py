# SPDX-License-Identifier: Apache-2.0
"""First chunks where vLLM has no FlashAttention for the GPU: xformers where it is installed, else torch's SDPA.

In: fresh queries, keys and values of a step. Out: rows of the output. Called by triton_path, which leaves cached context
to the latent kernel then. Slower than FlashAttention, and said so once.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from torch import Tensor

from vllm_kvsplice.serving.attention_layer import LayerCodec
from vllm_kvsplice.serving.metadata import Prefills
from vllm_kvsplice.serving.torch_path import fresh_attention

logger = logging.getLogger("vllm.kvsplice")


@lru_cache(maxsize=8)
def xformers_ops(head_dim: int, soft_cap: float | None) -> Any:
    """The module xformers.ops, or None where SDPA serves instead; logs which, once for each kind of layer."""
    ops = None
    if not soft_cap:  # of which xformers knows nothing
        try:
            import xformers.ops as ops  # type: ignore[import-not-found, no-redef]
        except ImportError:
            ops = None
    name = "xformers" if ops is not None else "torch's scaled_dot_product_attention, request by request"
    logger.warning(
        "kvsplice: vLLM has no FlashAttention for head_dim %d%s on this GPU: first chunks of prompts attend through %s, cached "
        "context through the latent kernel. Right, but slower.",
        head_dim,
        " with a soft cap" if soft_cap else "",
        name,
    )
    return ops


def attend_first_chunks(
    codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor, requests: Prefills, out: Tensor
) -> None:
    """Causal attention of each first chunk over its own keys and values [T, H, head_dim]; other rows hold anything after."""
    ops = xformers_ops(codec.layout.head_dim, codec.soft_cap)
    starts = requests.query_start_loc_cpu.tolist()
    if ops is not None:
        out.copy_(_xformers(ops, codec, query, key, value, [b - a for a, b in zip(starts, starts[1:], strict=False)]))
        return
    for a, b, first in zip(starts, starts[1:], requests.first_chunk, strict=False):
        if first:
            out[a:b] = fresh_attention(codec, query[a:b], key[a:b], value[a:b])


def _xformers(ops: Any, codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor, query_lens: list[int]) -> Tensor:
    """memory_efficient_attention_forward over all requests at once, in its layout for grouped heads [1, T, H, group, D]."""
    mask = ops.fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(query_lens, device=query.device)
    if codec.sliding_window:
        mask = mask.make_local_attention(codec.sliding_window)
    group = codec.num_heads // codec.num_kv_heads
    q = query.unflatten(1, (codec.num_kv_heads, group))[None]
    k, v = (x[None, :, :, None].expand(-1, -1, -1, group, -1) for x in (key, value))
    out: Tensor = ops.memory_efficient_attention_forward(q, k, v, attn_bias=mask, scale=codec.scale)
    return out.reshape(query.shape)
