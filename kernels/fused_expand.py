# SPDX-License-Identifier: Apache-2.0
"""Codes -> keys or values in head_dim, dequantised and expanded in one pass, for prefill over cached context.

In: loose codes (fused_expand_int8, fused_expand_int4) or pages (expand_cached). Out: x^ = D z + mu in the model's
dtype. Meaning: reference.dequantize and expand. As in decode, scales never touch elements:
x^ = scale * (D codes) + zero * (D 1) + mu.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_cache, check_dense, check_floats, wide_type
from kvsplice_kernels.packing import (
    dot,
    load_block,
    load_codes,
    load_scales,
    operand,
    own_columns,
    page_of,
    part_dims,
    to_float,
    unpack_part,
)
from kvsplice_kernels.plan import Plan, num_chunks, num_parts, num_tiers, rank_of, tier_bits
from kvsplice_kernels.query_tiles import check_requests

BLOCK_M = 64


@triton.jit
def _load_decode(decode_ptr, dims, dims_ok, d, HEAD_DIM: tl.constexpr, RANK: tl.constexpr):
    """Rows ``dims`` of D^T: [dims, BLOCK_D] fp32, 0 outside."""
    mask = dims_ok[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(decode_ptr + d[None, :] * RANK + dims[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def fused_expand_kernel(
    codes_ptr,  # [num_rows, num_heads, RANK * NBITS / 8] int8 or uint8
    scale_ptr,  # [num_rows, num_heads] fp16
    zero_ptr,  # like scale, or unused at 8 bits
    decode_ptr,  # [num_heads, HEAD_DIM, RANK] fp32
    mean_ptr,  # [num_heads, HEAD_DIM] fp32
    out_ptr,  # [num_rows, num_heads, HEAD_DIM] bf16, fp16 or fp32
    num_rows, stride_m, stride_h,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, NBITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = RANK * NBITS // 8
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_ok, d_ok = m < num_rows, d < HEAD_DIM
    decode_ptr += head * (HEAD_DIM * RANK)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ones = tl.zeros([BLOCK_D], tl.float32)  # D 1
    for start in range(0, ROW, BLOCK_R):
        col = start + tl.arange(0, BLOCK_R)
        ptrs = codes_ptr + (m * num_heads + head)[:, None] * ROW + col[None, :]
        raw = tl.load(ptrs, mask=m_ok[:, None] & (col < ROW)[None, :], other=0)
        for i in tl.static_range(8 // NBITS):
            weights = _load_decode(decode_ptr, i * ROW + col, col < ROW, d, HEAD_DIM, RANK)
            acc = dot(unpack_part(raw.to(tl.uint8, bitcast=True), i, NBITS).to(tl.float32), weights, acc, PRECISION)
            ones += tl.sum(weights, 0)
    row = m * num_heads + head
    acc *= tl.load(scale_ptr + row, mask=m_ok, other=0.0).to(tl.float32)[:, None]
    if NBITS < 8:
        acc += tl.load(zero_ptr + row, mask=m_ok, other=0.0).to(tl.float32)[:, None] * ones[None, :]
    acc += tl.load(mean_ptr + head * HEAD_DIM + d, mask=d_ok, other=0.0)[None, :]
    out_ptrs = out_ptr + (m * stride_m + head * stride_h)[:, None] + d[None, :]
    tl.store(out_ptrs, to_float(acc, out_ptr.dtype.element_ty), mask=m_ok[:, None] & d_ok[None, :])


def fused_expand_int8(codes: Tensor, scale: Tensor, decode: Tensor, mean: Tensor, out: Tensor) -> None:
    """out = scale * (D codes) + mean, for symmetric 8-bit codes.

    Args:
        codes: [M, H, rank] int8. scale: [M, H] fp16. decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [M, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_dense("codes", codes, (*codes.shape[:2], decode.shape[-1]), torch.int8)
    _fused_expand(codes, scale, scale, decode, mean, out, 8)


def fused_expand_int4(packed: Tensor, scale: Tensor, zero: Tensor, decode: Tensor, mean: Tensor, out: Tensor) -> None:
    """out = scale * (D codes) + zero * (D 1) + mean, for unsigned 4-bit codes packed by reference.pack.

    Args:
        packed: [M, H, rank / 2] uint8. scale, zero: [M, H] fp16. decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [M, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_dense("packed", packed, (*packed.shape[:2], decode.shape[-1] // 2), torch.uint8)
    check_dense("zero", zero, tuple(packed.shape[:2]), torch.float16)
    _fused_expand(packed, scale, zero, decode, mean, out, 4)


def _fused_expand(
    codes: Tensor, scale: Tensor, zero: Tensor, decode: Tensor, mean: Tensor, out: Tensor, bits: int
) -> None:
    M, H, row = codes.shape
    head_dim, rank = decode.shape[1:]
    check_dense("scale", scale, (M, H), torch.float16)
    check_dense("decode", decode, (H, head_dim, rank))
    check_dense("mean", mean, (H, head_dim))
    check_floats("out", out, (M, H, head_dim))
    if M == 0:
        return
    block_d = min(128, max(16, triton.next_power_of_2(head_dim)))
    fused_expand_kernel[(triton.cdiv(M, BLOCK_M), H, triton.cdiv(head_dim, block_d))](
        codes, scale, zero, decode, mean, out, M, out.stride(0), out.stride(1),
        HEAD_DIM=head_dim, RANK=rank, NBITS=bits, PRECISION=_precision(out),
        BLOCK_M=BLOCK_M, BLOCK_D=block_d, BLOCK_R=min(32, max(16, triton.next_power_of_2(row))), num_warps=4, num_stages=2,
    )  # fmt: skip


def _precision(out: Tensor) -> str:
    """Codes are exact in tf32, so one pass loses only what D loses: less than rounding to bf16, not to fp16."""
    return "tf32" if out.dtype == torch.bfloat16 else "tf32x3"


@triton.jit
def _expand_tier(
    page, row, valid, scale, zero, decode_ptr, d, PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([TILE, BLOCK_D], tl.float32)
    ones = tl.zeros([BLOCK_D], tl.float32)
    for c in tl.static_range(num_chunks(PLAN, t)):
        raw = load_codes(page, row, valid, PLAN, t, c, WIDE, False)
        inside = own_columns(PLAN, t, c)
        for i in tl.static_range(num_parts(PLAN, t)):
            dims = part_dims(i, PLAN, t, c)
            weights = _load_decode(decode_ptr, dims, inside, d, HEAD_DIM, RANK)
            acc = dot(operand(raw, i, PLAN, t).to(tl.float32), weights, acc, PRECISION)
            ones += tl.sum(weights, 0)
    if tier_bits(PLAN, t) == 16:
        return acc
    else:
        return acc * scale.to(tl.float32)[:, None] + zero.to(tl.float32)[:, None] * ones[None, :]


@triton.jit(do_not_specialize=["stride_table"])
def expand_cached_kernel(
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, C] uint8
    block_table_ptr,  # [num_reqs, max_blocks] int32
    seq_lens_ptr,  # [num_reqs] int32
    cu_seqlens_ptr,  # [num_reqs + 1] int32
    decode_ptr,  # [num_kv_heads, HEAD_DIM, RANK] fp32
    mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    out_ptr,  # [sum of seq_lens, num_kv_heads, HEAD_DIM] bf16, fp16 or fp32
    stride_table, stride_block, stride_head, stride_m, stride_h,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PLAN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    D_BLOCKS: tl.constexpr,
):  # fmt: skip
    tile, request = tl.program_id(0), tl.program_id(2)
    head, d = tl.program_id(1) // D_BLOCKS, tl.program_id(1) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    seq_len = tl.load(seq_lens_ptr + request)
    if tile * TILE < seq_len:
        position = tile * TILE + tl.arange(0, TILE)
        valid = position < seq_len
        row = position % BLOCK_SIZE
        table_ptr = block_table_ptr + request.to(tl.int64) * stride_table
        block = load_block(table_ptr, tile, 0, seq_len, TILE, BLOCK_SIZE)
        page = page_of(kv_cache_ptr + head.to(tl.int64) * stride_head, block, stride_block)
        scales = load_scales(page, row, PLAN)
        x = tl.zeros([TILE, BLOCK_D], tl.float32)
        for t in tl.static_range(num_tiers(PLAN)):
            x += _expand_tier(
                page, row, valid, scales[2 * t], scales[2 * t + 1], decode_ptr + head * (HEAD_DIM * RANK), d,
                PLAN, t, WIDE, HEAD_DIM, RANK, PRECISION, TILE, BLOCK_D,
            )  # fmt: skip
        x += tl.load(mean_ptr + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)[None, :]
        m = (tl.load(cu_seqlens_ptr + request) + position).to(tl.int64)
        out_ptrs = out_ptr + (m * stride_m + head * stride_h)[:, None] + d[None, :]
        tl.store(out_ptrs, to_float(x, out_ptr.dtype.element_ty), mask=valid[:, None] & (d < HEAD_DIM)[None, :])


def expand_cached(
    kv_cache: Tensor,
    plan: Plan,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    decode: Tensor,
    mean: Tensor,
    out: Tensor,
    max_seq_len: int,
    wide_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Expand the first ``seq_lens`` cached tokens of every request to head_dim, one request after another in ``out``.

    Args:
        kv_cache: [num_blocks, H, block_size, C] uint8. plan: LatentLayout.plan of the side to expand.
        block_table: [B, max_blocks] int32. seq_lens: [B] int32. cu_seqlens: [B + 1] int32, where each request starts.
        decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [sum of seq_lens, H, head_dim], bfloat16, float16 or float32. max_seq_len: upper bound of seq_lens.
        wide_dtype: of 16-bit tiers.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    H, block_size = kv_cache.shape[1:3]
    head_dim, rank = decode.shape[1], rank_of(plan)
    check_cache(kv_cache, (plan,))
    num_reqs = check_requests(block_table, seq_lens, cu_seqlens)
    check_dense("decode", decode, (H, head_dim, rank))
    check_dense("mean", mean, (H, head_dim))
    check_floats("out", out, (out.shape[0], H, head_dim))
    if num_reqs == 0 or max_seq_len == 0:
        return
    block_d = min(128, max(16, triton.next_power_of_2(head_dim)))
    d_blocks = triton.cdiv(head_dim, block_d)
    expand_cached_kernel[(triton.cdiv(max_seq_len, BLOCK_M), H * d_blocks, num_reqs)](
        kv_cache, block_table, seq_lens, cu_seqlens, decode, mean, out,
        block_table.stride(0), kv_cache.stride(0), kv_cache.stride(1), out.stride(0), out.stride(1),
        HEAD_DIM=head_dim, RANK=rank, PLAN=plan, WIDE=wide_type(wide_dtype),
        BLOCK_SIZE=block_size, PRECISION=_precision(out), TILE=BLOCK_M, BLOCK_D=block_d, D_BLOCKS=d_blocks, num_warps=4, num_stages=2,
    )  # fmt: skip
