# SPDX-License-Identifier: Apache-2.0
"""New keys and values -> latents -> codes -> their slots in the paged cache. One launch for K and V of a layer.

In: the step's key and value, slot_mapping, the two bases. Out: bytes in kv_cache, read next by decode. Meaning:
reference.encode, quantize, pack and write_side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_cache, check_dense, check_floats, wide_type
from kvsplice_kernels.packing import (
    CLIP_COUNT_2,
    CLIP_COUNT_4,
    CLIP_STEP_2,
    CLIP_STEP_4,
    code_ptrs,
    dot,
    inverse_scale,
    own_columns,
    pack_part,
    part_dims,
    round_even,
    round_to_code,
    scale_ptrs,
    to_float,
    to_fp16,
)
from kvsplice_kernels.plan import (
    Plan,
    chunk_pad,
    chunk_part,
    chunk_width,
    has_zero,
    num_chunks,
    num_parts,
    num_tiers,
    rank_of,
    scale_offset,
    tier_bits,
)

SMALL_STEP = 512  # tokens up to which programs take 16 rows each, to spread them over more of the GPU


@triton.jit
def _latent_zeros(PLAN: tl.constexpr, BLOCK_T: tl.constexpr):
    z = ()
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            for _ in tl.static_range(num_parts(PLAN, t)):
                z = z + (tl.zeros([BLOCK_T, chunk_pad(PLAN, t, c)], tl.float32),)
    return z


@triton.jit
def _project_chunk(
    z, x, encode_ptr, d, d_ok, HEAD_DIM: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr
):
    """The parts of one chunk, each with x [BLOCK_T, BLOCK_D] @ its rows of encode [rank, HEAD_DIM] added."""
    new = ()
    for i in tl.static_range(num_parts(PLAN, t)):
        dims = part_dims(i, PLAN, t, c)
        inside = own_columns(PLAN, t, c)
        e = tl.load(encode_ptr + dims[None, :] * HEAD_DIM + d[:, None], mask=inside[None, :] & d_ok[:, None], other=0.0)
        new = new + (dot(x, e, z[chunk_part(PLAN, t, c) + i], "tf32x3"),)
    return new


@triton.jit
def _project(
    x_ptrs, mean_ptr, encode_ptr, kept,
    HEAD_DIM: tl.constexpr, PLAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Latents of BLOCK_T tokens as a tuple of [BLOCK_T, PAD] tiles, one for each part; unused columns are 0."""
    z = _latent_zeros(PLAN, BLOCK_T)
    for start in range(0, HEAD_DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < HEAD_DIM
        x = tl.load(x_ptrs[:, None] + d[None, :], mask=kept[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
        x = tl.where(d_ok[None, :], x - tl.load(mean_ptr + d, mask=d_ok, other=0.0)[None, :], 0.0)
        new = ()
        for t in tl.static_range(num_tiers(PLAN)):
            for c in tl.static_range(num_chunks(PLAN, t)):
                new = new + _project_chunk(z, x, encode_ptr, d, d_ok, HEAD_DIM, PLAN, t, c)
        z = new
    return z


@triton.jit
def _range_of(z, PLAN: tl.constexpr, t: tl.constexpr, BLOCK_T: tl.constexpr):
    """Least and greatest latent of each token in a tier; padding columns do not take part."""
    low = tl.full([BLOCK_T], float("inf"), tl.float32)
    high = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for c in tl.static_range(num_chunks(PLAN, t)):
        inside = own_columns(PLAN, t, c)
        for i in tl.static_range(num_parts(PLAN, t)):
            part = z[chunk_part(PLAN, t, c) + i]
            low = tl.minimum(low, tl.min(tl.where(inside[None, :], part, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(inside[None, :], part, float("-inf")), 1))
    return low, high


@triton.jit
def _squared_error(z, scale, zero, HIGH: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr):
    """Squared error [BLOCK_T] of a tier's codes at this scale and zero point; infinite for a zero scale."""
    inverse = inverse_scale(scale)
    error = tl.zeros(scale.shape, tl.float32)
    for c in tl.static_range(num_chunks(PLAN, t)):
        for i in tl.static_range(num_parts(PLAN, t)):
            number = (z[chunk_part(PLAN, t, c) + i] - zero[:, None]) * inverse[:, None]
            off = round_even(tl.minimum(tl.maximum(number, 0.0), HIGH)) - number
            if chunk_width(PLAN, t, c) < chunk_pad(PLAN, t, c):
                off = tl.where(own_columns(PLAN, t, c)[None, :], off, 0.0)
            error += tl.sum(off * off, 1)
    return tl.where(scale > 0, error * scale * scale, float("inf"))


@triton.jit
def _scale_and_zero(z, PLAN: tl.constexpr, t: tl.constexpr, BLOCK_T: tl.constexpr):
    """fp16 scale and zero point of a tier by reference.quantize: absolute maximum at 8 bits, else the clip search."""
    low, high = _range_of(z, PLAN, t, BLOCK_T)
    if tier_bits(PLAN, t) == 8:
        scale = to_fp16(tl.div_rn(tl.maximum(high, -low), tl.full([BLOCK_T], 127.0, tl.float32)))
        return scale, tl.zeros([BLOCK_T], tl.float16)
    else:
        HIGH: tl.constexpr = (1 << tier_bits(PLAN, t)) - 1
        COUNT: tl.constexpr = CLIP_COUNT_4 if tier_bits(PLAN, t) == 4 else CLIP_COUNT_2
        STEP: tl.constexpr = CLIP_STEP_4 if tier_bits(PLAN, t) == 4 else CLIP_STEP_2
        middle, half = (low + high) * 0.5, (high - low) * 0.5
        for i in tl.static_range(COUNT):
            shrunk = half * (1.0 - i * STEP)
            scale, zero = (
                to_fp16(tl.div_rn(2.0 * shrunk, tl.full([BLOCK_T], HIGH, tl.float32))),
                to_fp16(middle - shrunk),
            )
            error = _squared_error(z, scale.to(tl.float32), zero.to(tl.float32), HIGH, PLAN, t)
            if i == 0:
                best, best_scale, best_zero = error, scale, zero
            else:
                better = error < best
                best = tl.where(better, error, best)
                best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
        return best_scale, best_zero


@triton.jit
def _store_chunk(
    z, scale, inverse, zero, page, row, kept, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr, WIDE: tl.constexpr
):
    ptrs = code_ptrs(page, row, PLAN, t, c, WIDE, False)
    mask = kept[:, None] & own_columns(PLAN, t, c)[None, :]
    if tier_bits(PLAN, t) == 16:
        tl.store(ptrs, to_float(z[chunk_part(PLAN, t, c)], WIDE), mask=mask)
    else:
        LOW: tl.constexpr = -127 if tier_bits(PLAN, t) == 8 else 0
        HIGH: tl.constexpr = 127 if tier_bits(PLAN, t) == 8 else (1 << tier_bits(PLAN, t)) - 1
        packed = tl.zeros([row.shape[0], chunk_pad(PLAN, t, c)], tl.int32)
        for i in tl.static_range(num_parts(PLAN, t)):
            code = round_to_code(z[chunk_part(PLAN, t, c) + i], scale, inverse, zero, LOW, HIGH)
            packed = pack_part(packed, code, i, tier_bits(PLAN, t))
        tl.store(ptrs, packed.to(tl.uint8), mask=mask)


@triton.jit
def _store_tier(z, page, row, kept, PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr):
    scale, zero = tl.zeros([BLOCK_T], tl.float16), tl.zeros([BLOCK_T], tl.float16)
    if scale_offset(PLAN, t) >= 0:
        scale, zero = _scale_and_zero(z, PLAN, t, BLOCK_T)
        ptrs = scale_ptrs(page, row, PLAN, t)
        tl.store(ptrs, scale, mask=kept)
        if has_zero(PLAN, t):
            tl.store(ptrs + 1, zero, mask=kept)
    s = scale.to(tl.float32)
    inverse = inverse_scale(s)
    for c in tl.static_range(num_chunks(PLAN, t)):
        _store_chunk(z, s, inverse, zero.to(tl.float32), page, row, kept, PLAN, t, c, WIDE)


@triton.jit
def _write_side(
    x_ptr, stride_t, stride_h, encode_ptr, mean_ptr, page, row, token, kept, head,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PLAN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x_ptrs = x_ptr + token.to(tl.int64) * stride_t + head * stride_h
    mean_ptr += head * HEAD_DIM
    encode_ptr += head * (RANK * HEAD_DIM)
    z = _project(x_ptrs, mean_ptr, encode_ptr, kept, HEAD_DIM, PLAN, BLOCK_T, BLOCK_D)
    for t in tl.static_range(num_tiers(PLAN)):
        _store_tier(z, page, row, kept, PLAN, t, WIDE, BLOCK_T)


@triton.jit(do_not_specialize=["num_tokens"])
def cache_write_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM] bf16, fp16 or fp32
    value_ptr,  # like key
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, C] uint8
    slot_mapping_ptr,  # [num_tokens] int64, block * BLOCK_SIZE + offset, or < 0
    k_encode_ptr,  # [num_kv_heads, K_RANK, HEAD_DIM] fp32
    k_mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    v_encode_ptr,  # [num_kv_heads, V_RANK, HEAD_DIM] fp32
    v_mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    num_tokens,
    stride_key_t, stride_key_h, stride_value_t, stride_value_h, stride_block, stride_head,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr,
    K_RANK: tl.constexpr, K_PLAN: tl.constexpr,
    V_RANK: tl.constexpr, V_PLAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1)
    kept = slot >= 0
    slot = tl.where(kept, slot, 0)
    page = kv_cache_ptr + (slot // BLOCK_SIZE) * stride_block + head.to(tl.int64) * stride_head  # slot is int64
    row = (slot % BLOCK_SIZE).to(tl.int32)
    if tl.program_id(2) == 0:
        _write_side(
            key_ptr, stride_key_t, stride_key_h, k_encode_ptr, k_mean_ptr, page, row, token, kept, head,
            HEAD_DIM, K_RANK, K_PLAN, WIDE, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    else:
        _write_side(
            value_ptr, stride_value_t, stride_value_h, v_encode_ptr, v_mean_ptr, page, row, token, kept, head,
            HEAD_DIM, V_RANK, V_PLAN, WIDE, BLOCK_T, BLOCK_D,
        )  # fmt: skip


def cache_write(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    k_encode: Tensor,
    k_mean: Tensor,
    v_encode: Tensor,
    v_mean: Tensor,
    k_plan: Plan,
    v_plan: Plan,
    wide_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Encode, quantise and scatter the step's keys and values into ``kv_cache``, in place.

    Args:
        key, value: [>= T, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
        kv_cache: [num_blocks, H, block_size, C] uint8, outer strides free.
        slot_mapping: [T] int64; slot = block * block_size + offset, a negative one is skipped.
        k_encode, v_encode: [H, rank, head_dim] fp32. k_mean, v_mean: [H, head_dim] fp32.
        k_plan, v_plan: LatentLayout.plan("k" | "v", block_size). wide_dtype: of 16-bit tiers.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    num_tokens, (H, head_dim) = slot_mapping.shape[0], key.shape[1:]
    for name, x in (("key", key), ("value", value)):
        check_floats(name, x, (key.shape[0], H, head_dim))
    if slot_mapping.dtype != torch.int64 or slot_mapping.stride(0) != 1 or num_tokens > key.shape[0]:
        raise ValueError(
            f"slot_mapping: expected at most {key.shape[0]} contiguous int64, got {num_tokens} of {slot_mapping.dtype}"
        )
    check_cache(kv_cache, (k_plan, v_plan))
    if kv_cache.shape[1] != H:
        raise ValueError(f"kv_cache: expected {H} KV heads, got {kv_cache.shape[1]}")
    k_rank, v_rank = rank_of(k_plan), rank_of(v_plan)
    for name, encode, mean, rank in (("k", k_encode, k_mean, k_rank), ("v", v_encode, v_mean, v_rank)):
        check_dense(f"{name}_encode", encode, (H, rank, head_dim))
        check_dense(f"{name}_mean", mean, (H, head_dim))
    if num_tokens == 0:
        return
    block_t = 16 if num_tokens <= SMALL_STEP else 64  # a warp holds 16 rows of a dot, more warps only copies of them
    cache_write_kernel[(triton.cdiv(num_tokens, block_t), H, 2)](
        key, value, kv_cache, slot_mapping, k_encode, k_mean, v_encode, v_mean, num_tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), kv_cache.stride(0), kv_cache.stride(1),
        HEAD_DIM=head_dim, BLOCK_SIZE=kv_cache.shape[2], WIDE=wide_type(wide_dtype),
        K_RANK=k_rank, K_PLAN=k_plan, V_RANK=v_rank, V_PLAN=v_plan,
        BLOCK_T=block_t, BLOCK_D=16 if block_t == 16 else 32, num_warps=block_t // 16, num_stages=2,
    )  # fmt: skip
