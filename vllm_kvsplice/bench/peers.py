# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3 as vLLM 0.32 calls it, with bf16 and fp8 caches; and the list of all peers.

In: a format's name and a cache size. Out: an ``OpenCache``. Signatures: vllm/vllm_flash_attn/flash_attn_interface.py and
v1/attention/backends/flash_attn.py. A peer that is not there raises ImportError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_kvsplice.bench import peers_triton, peers_xformers
from vllm_kvsplice.bench.kernels_data import Batch, OpenCache, Shape

FA3 = 3
MAX_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph; the scheduler metadata says how many are used


def open_cache(kernel: str, preset: str, shape: Shape, num_blocks: int, device: str) -> OpenCache:
    """An empty cache of a peer.

    Raises:
        ImportError: the peer, or the version of it that this GPU can run, is not installed.
    """
    opener = {
        "flash-attention-3": _flash_attention,
        "vllm-triton": peers_triton.unified,
        "turboquant": peers_triton.turboquant,
        "xformers-splitk": peers_xformers.split_k,
    }[kernel]
    return opener(preset, shape, num_blocks, device)


def preload() -> None:
    """Import what peers need now, while nothing is measured; what is missing is found again, and reported, later."""
    with contextlib.suppress(ImportError):
        pass


def bytes_per_token_head(kernel: str, preset: str, head_dim: int) -> int:
    """All-in bytes of K and V per token and KV head, scales counted."""
    return {
        ("flash-attention-3", "bf16"): 4 * head_dim,
        ("flash-attention-3", "fp8"): 2 * head_dim,
        ("vllm-triton", "bf16"): 4 * head_dim,
        ("vllm-triton", "int8"): 2 * (head_dim + 4),
        ("vllm-triton", "int4"): 2 * (head_dim // 2 + 4),
        ("turboquant", "k8v4"): head_dim + head_dim // 2 + 4,
        ("turboquant", "4bit_nc"): head_dim // 2 + 2 + head_dim // 2 + 4,
        ("xformers-splitk", "int4"): 2 * (head_dim // 2 + 4),
    }[kernel, preset]


def _flash_attention(preset: str, shape: Shape, num_blocks: int, device: str) -> OpenCache:
    from vllm.vllm_flash_attn import fa_version_unsupported_reason, is_fa_version_supported

    if not is_fa_version_supported(FA3):
        raise ImportError(str(fa_version_unsupported_reason(FA3)))
    fp8 = preset == "fp8"
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    # K and V of a token side by side: vLLM's default layout (LBNHC).
    dims = num_blocks, shape.block_size, shape.num_kv_heads, 2 * shape.head_dim
    cache = torch.zeros(dims, dtype=torch.uint8 if fp8 else dtype, device=device)
    key_cache, value_cache = cache.split(shape.head_dim, dim=-1)

    def fill(key: Tensor, value: Tensor, slots: Tensor) -> None:
        both = torch.cat([key, value], dim=-1).to(dtype)
        cache[slots // shape.block_size, slots % shape.block_size] = both.view(cache.dtype)

    def attention(batch: Batch, at: Shape) -> Callable[[Tensor], None]:
        return _attention(batch, at, key_cache.view(dtype), value_cache.view(dtype))

    # fp8: K, V, Q and the probabilities inside each round to 3 bits of mantissa.
    return OpenCache(
        (cache,),
        fill,
        _cache_writer(key_cache, value_cache, "fp8" if fp8 else "auto", device),
        attention,
        0.15 if fp8 else 1e-2,
        MAX_SPLITS,
    )


def _attention(batch: Batch, at: Shape, key_cache: Tensor, value_cache: Tensor) -> Callable[[Tensor], None]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    splits = MAX_SPLITS if at.query_len == 1 else 0  # as in vLLM: bounded under full CUDA graphs, else its own choice
    metadata = get_scheduler_metadata(
        batch_size=at.batch,
        max_seqlen_q=at.query_len,
        max_seqlen_k=at.context,
        num_heads_q=at.num_heads,
        num_heads_kv=at.num_kv_heads,
        headdim=at.head_dim,
        cache_seqlens=batch.seq_lens,
        qkv_dtype=key_cache.dtype,
        cu_seqlens_q=batch.query_start_loc,
        page_size=at.block_size,
        causal=True,
        window_size=(-1, -1),
        num_splits=splits,
    )
    query, scales = batch.query, {}
    if key_cache.dtype == torch.float8_e4m3fn:
        query = query.to(key_cache.dtype)
        one = torch.ones(1, device=query.device).expand(at.batch, at.num_kv_heads)
        scales = {"q_descale": one, "k_descale": one, "v_descale": one}

    def attend(table: Tensor) -> None:
        flash_attn_varlen_func(
            q=query,
            k=key_cache,
            v=value_cache,
            out=batch.out,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=at.query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=at.context,
            softmax_scale=at.scale,
            causal=True,
            window_size=[-1, -1],
            block_table=table,
            scheduler_metadata=metadata,
            num_splits=splits,
            fa_version=FA3,
            **scales,
        )

    return attend


def _cache_writer(
    key_cache: Tensor, value_cache: Tensor, kv_cache_dtype: str, device: str
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """vLLM's reshape_and_cache_flash."""
    one = torch.ones(1, device=device)

    def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
        from vllm._custom_ops import reshape_and_cache_flash

        reshape_and_cache_flash(key, value, key_cache, value_cache, slots, kv_cache_dtype, one, one)

    return write
