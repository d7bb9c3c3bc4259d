# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.32's Triton caches: unified attention over bf16, int8 and int4 per token and head, and TurboQuant.

In: a format's name and a cache size. Out: an ``OpenCache``, called as vllm/v1/attention/backends/triton_attn.py and
turboquant_attn.py call their kernels. Fills are by each format's own writer, so that its reader sees what it expects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_kvsplice.bench.kernels_data import Batch, OpenCache, Shape

# Of triton_attn.py: batches above 128 programs run unsplit, others in 16 segments.
LAUNCH_GRID_2D = 128
SEGMENTS = 16
TURBOQUANT_SPLITS = 32  # tq_max_kv_splits_for_cuda_graph
# Relative error of attention over normal numbers that each format makes by itself; a misread cache errs by 1 and more.
TOLERANCES = {"bf16": 1e-2, "int8": 3e-2, "int4": 0.3, "k8v4": 0.3, "4bit_nc": 0.3}


# ---------------------------------------------------------------- unified attention
def unified(preset: str, shape: Shape, num_blocks: int, device: str) -> OpenCache:
    """Caches "bf16", "int8" and "int4"; the fp32 scales of the last two lie behind each head's codes, as in vLLM."""
    _require_triton()
    D, H, N = shape.head_dim, shape.num_kv_heads, shape.block_size
    dtype, side = {"bf16": (torch.bfloat16, D), "int8": (torch.int8, D + 4), "int4": (torch.uint8, D // 2 + 4)}[preset]
    cache = torch.zeros(num_blocks, N, H, 2 * side, dtype=dtype, device=device)
    key_cache, value_cache = cache.split(side, dim=-1)
    scales: tuple[Tensor, Tensor] | None = None
    if preset != "bf16":
        words = cache.view(torch.float32)  # a head's row is two codes and a scale each, all multiples of 4 bytes
        scales = words[..., side // 4 - 1], words[..., side // 2 - 1]
    write = _unified_writer(preset, key_cache, value_cache, scales, device)

    def attention(batch: Batch, at: Shape) -> Callable[[Tensor], None]:
        return _unified_attention(preset, batch, at, key_cache, value_cache, scales)

    return OpenCache((cache,), write, write, attention, TOLERANCES[preset])


def _unified_writer(
    preset: str, key_cache: Tensor, value_cache: Tensor, scales: tuple[Tensor, Tensor] | None, device: str
) -> Callable[[Tensor, Tensor, Tensor], None]:
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
        triton_reshape_and_cache_flash,
        triton_reshape_and_cache_flash_per_token_head_quant,
    )

    one = torch.ones(1, device=device)

    def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
        if scales is None:
            triton_reshape_and_cache_flash(key, value, key_cache, value_cache, slots, "auto", one, one)
        else:
            triton_reshape_and_cache_flash_per_token_head_quant(
                key, value, key_cache, value_cache, *scales, slots, kv_quant_mode=_quant_mode(preset)
            )

    return write


def _unified_attention(
    preset: str, batch: Batch, at: Shape, key_cache: Tensor, value_cache: Tensor, scales: tuple[Tensor, Tensor] | None
) -> Callable[[Tensor], None]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    device = batch.query.device
    threshold = LAUNCH_GRID_2D // at.num_kv_heads
    rows = threshold, at.num_heads, SEGMENTS
    padded = 1 << (at.head_dim - 1).bit_length()
    partial_out = torch.empty(*rows, padded, device=device)
    partial_max, partial_sum = (torch.empty(rows, device=device) for _ in range(2))
    extra: dict[str, Any] = {"k_descale": None, "v_descale": None}
    if scales is None:
        one = torch.ones(1, device=device).expand(at.batch, at.num_kv_heads)
        extra = {"k_descale": one, "v_descale": one}
    else:
        extra |= {"k_scale_cache": scales[0], "v_scale_cache": scales[1]}

    def attend(table: Tensor) -> None:
        unified_attention(
            q=batch.query,
            k=key_cache,
            v=value_cache,
            out=batch.out,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=at.query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=at.context,
            softmax_scale=at.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0,
            q_descale=None,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=partial_out,
            softmax_segm_max=partial_max,
            softmax_segm_expsum=partial_sum,
            kv_quant_mode=_quant_mode(preset),
            **extra,
        )

    return attend


def _quant_mode(preset: str) -> Any:
    from vllm.v1.kv_cache_interface import KVQuantMode

    names = {"bf16": "NONE", "int8": "INT8_PER_TOKEN_HEAD", "int4": "INT4_PER_TOKEN_HEAD"}
    return KVQuantMode[names[preset]]


# ---------------------------------------------------------------- TurboQuant
def turboquant(preset: str, shape: Shape, num_blocks: int, device: str) -> OpenCache:
    """Caches "k8v4" (fp8 keys) and "4bit_nc" (Lloyd-Max keys, norms corrected); values in 4 bits."""
    _require_triton()
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    config = TurboQuantConfig.from_cache_dtype(f"turboquant_{preset}", shape.head_dim)
    dims = num_blocks, shape.block_size, shape.num_kv_heads, config.slot_size_aligned
    cache = torch.zeros(dims, dtype=torch.uint8, device=device)
    rotation = _hadamard(shape.head_dim, device)
    centroids = get_centroids(shape.head_dim, config.centroid_bits).to(device=device, dtype=torch.float32)
    ordered = centroids.sort().values
    midpoints = (ordered[:-1] + ordered[1:]) / 2

    def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
        triton_turboquant_store(
            key,
            value,
            cache,
            slots,
            rotation,
            midpoints,
            mse_bits=config.key_mse_bits,
            key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits,
            key_fp8=config.key_fp8,
        )

    def attention(batch: Batch, at: Shape) -> Callable[[Tensor], None]:
        return _turboquant_attention(config, batch, at, cache, rotation, centroids)

    return OpenCache((cache,), write, write, attention, TOLERANCES[preset], TURBOQUANT_SPLITS)


def _turboquant_attention(
    config: Any, batch: Batch, at: Shape, cache: Tensor, rotation: Tensor, centroids: Tensor
) -> Callable[[Tensor], None]:
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    device, rows = batch.query.device, (at.batch, at.num_heads)
    partials = torch.empty(*rows, TURBOQUANT_SPLITS, at.head_dim + 1, device=device)
    lse = torch.empty(rows, device=device)

    def attend(table: Tensor) -> None:
        triton_turboquant_decode_attention(
            query=batch.query,
            kv_cache=cache,
            block_table=table,
            seq_lens=batch.seq_lens,
            Pi=rotation,
            centroids=centroids,
            scale=at.scale,
            mse_bits=config.key_mse_bits,
            key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits,
            key_fp8=config.key_fp8,
            norm_correction=config.norm_correction,
            PiT=rotation,
            mid_o_buf=partials,
            output_buf=batch.out,
            lse_buf=lse,
            max_num_kv_splits=TURBOQUANT_SPLITS,
        )

    return attend


def _hadamard(size: int, device: str) -> Tensor:
    """Orthonormal and symmetric; ``size`` a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / size**0.5).to(device)


def _require_triton() -> None:
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise ImportError("vLLM finds no Triton for this device")
