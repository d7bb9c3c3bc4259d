# SPDX-License-Identifier: Apache-2.0
"""Codes -> keys or values in head_dim, dequantised and expanded in one pass, for prefill over cached context.

In: loose codes (fused_expand_int8, fused_expand_int4) or pages (expand_cached). Out: x^ = D z + mu in the model's
dtype, for FlashAttention. Meaning: reference.dequantize and expand. As in decode, scales never touch elements:
x^ = scale * (D codes - middle * D 1) + mu.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_cache, check_dense, check_floats, next_power_of_2, wide_type
from kvsplice_kernels.packing import (
    dot,
    floor_power_of_two,
    inverse_power_of_two,
    load_block,
    load_codes,
    load_scales,
    operand,
    own_columns,
    page_of,
    part_dims,
    scale_of,
    to_float,
    unpack_part,
)
from kvsplice_kernels.plan import Plan, chunk_pad, middle, num_chunks, num_parts, num_tiers, rank_of, tier_bits
from kvsplice_kernels.query_tiles import check_requests, find_tile, num_query_tiles

BLOCK_M = 64
START_MULTIPLE = (
    BLOCK_M  # of the first token of an expanded range, so that no tile reads two pages where one can hold it
)
# A program loads D once and expands RUNS[0] tiles with it, or RUNS[1] from LONG_ROWS rows x heads on, when programs still
# fill a GPU twice over.
RUNS = (2, 8)
LONG_ROWS = 1024 * BLOCK_M


@triton.jit
def _load_decode(decode_ptr, dims, dims_ok, d, HEAD_DIM: tl.constexpr, RANK: tl.constexpr):
    """Rows ``dims`` of D^T: [dims, BLOCK_D] fp32, 0 outside."""
    mask = dims_ok[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(decode_ptr + d[None, :] * RANK + dims[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def fused_expand_kernel(
    codes_ptr,  # [num_rows, num_heads, RANK * NBITS / 8] int8 or uint8
    scale_ptr,  # [num_rows, num_heads] uint8, reference.scale_of
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
    if NBITS < 8:
        acc -= ones[None, :] * (((1 << NBITS) - 1) / 2)
    acc *= scale_of(tl.load(scale_ptr + row, mask=m_ok, other=0).to(tl.int32))[:, None]
    acc += tl.load(mean_ptr + head * HEAD_DIM + d, mask=d_ok, other=0.0)[None, :]
    out_ptrs = out_ptr + (m * stride_m + head * stride_h)[:, None] + d[None, :]
    tl.store(out_ptrs, to_float(acc, out_ptr.dtype.element_ty), mask=m_ok[:, None] & d_ok[None, :])


def fused_expand_int8(codes: Tensor, scale: Tensor, decode: Tensor, mean: Tensor, out: Tensor) -> None:
    """out = scale * (D codes) + mean, for symmetric 8-bit codes.

    Args:
        codes: [M, H, rank] int8. scale: [M, H] uint8, see reference.scale_of. decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [M, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_dense("codes", codes, (*codes.shape[:2], decode.shape[-1]), torch.int8)
    _fused_expand(codes, scale, decode, mean, out, 8)


def fused_expand_int4(packed: Tensor, scale: Tensor, decode: Tensor, mean: Tensor, out: Tensor) -> None:
    """out = scale * (D (codes - 7.5)) + mean, for unsigned 4-bit codes packed by reference.pack.

    Args:
        packed: [M, H, rank / 2] uint8. scale: [M, H] uint8, see reference.scale_of. decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [M, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_dense("packed", packed, (*packed.shape[:2], decode.shape[-1] // 2), torch.uint8)
    _fused_expand(packed, scale, decode, mean, out, 4)


def _fused_expand(codes: Tensor, scale: Tensor, decode: Tensor, mean: Tensor, out: Tensor, bits: int) -> None:
    M, H, row = codes.shape
    head_dim, rank = decode.shape[1:]
    check_dense("scale", scale, (M, H), torch.uint8)
    check_dense("decode", decode, (H, head_dim, rank))
    check_dense("mean", mean, (H, head_dim))
    check_floats("out", out, (M, H, head_dim))
    if M == 0:
        return
    block_d = min(128, max(16, next_power_of_2(head_dim)))
    fused_expand_kernel[(-(-M // BLOCK_M), H, -(-head_dim // block_d))](
        codes, scale, decode, mean, out, M, out.stride(0), out.stride(1),
        HEAD_DIM=head_dim, RANK=rank, NBITS=bits, PRECISION=_precision(out),
        BLOCK_M=BLOCK_M, BLOCK_D=block_d, BLOCK_R=min(32, max(16, next_power_of_2(row))), num_warps=4, num_stages=2,
    )  # fmt: skip


def _precision(out: Tensor) -> str:
    """Codes are exact in tf32, so one pass loses only what D loses: less than rounding to bf16, not to fp16."""
    return "tf32" if out.dtype == torch.bfloat16 else "tf32x3"


# ---------------------------------------------------------------- straight from pages
@triton.constexpr_function
def _split(plan, t, wide, exact):
    """Whether D needs a second operand: one of bf16 has 8 bits; one of fp16 has 11, more than a bf16 result."""
    return exact or (plan[t][0] == 16 and wide == tl.bfloat16)


@triton.jit
def _load_tier(
    decode_ptr, d, PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """One tier's rows of D^T as 16-bit operands (high, low) in units of a power of two, that unit, and D of the codes
    of zeros [BLOCK_D]."""
    TYPE: tl.constexpr = WIDE if tier_bits(PLAN, t) == 16 else tl.float16
    ones = tl.zeros(d.shape, tl.float32)
    greatest = 0.0
    parts = ()
    for c in tl.static_range(num_chunks(PLAN, t)):
        total = tl.zeros([chunk_pad(PLAN, t, c), d.shape[0]], tl.float32)
        for i in tl.static_range(num_parts(PLAN, t)):
            weights = _load_decode(decode_ptr, part_dims(i, PLAN, t, c), own_columns(PLAN, t, c), d, HEAD_DIM, RANK)
            greatest = tl.maximum(greatest, tl.max(tl.abs(weights)))
            total += weights
            parts = parts + (weights,)
        ones += tl.sum(total, 0) * middle(PLAN, t)
    unit = floor_power_of_two(greatest)
    inverse = inverse_power_of_two(unit)
    operands = ()
    for p in tl.static_range(len(parts)):
        weights = parts[p] * inverse
        high = to_float(weights, TYPE)
        low = to_float(weights - high.to(tl.float32), TYPE) if _split(PLAN, t, WIDE, EXACT) else 0
        operands = operands + (high, low)
    return operands, unit, ones


@triton.jit
def _expand_tier(
    x, page, row, valid, scale, tier, PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """x [TILE, BLOCK_D] plus one tier's share of D z; none in rows that are not valid."""
    operands, unit, ones = tier
    acc = tl.zeros(x.shape, tl.float32)
    for c in tl.static_range(num_chunks(PLAN, t)):
        raw = load_codes(page, row, valid, PLAN, t, c, WIDE)
        for i in tl.static_range(num_parts(PLAN, t)):
            codes = operand(raw, i, PLAN, t)
            acc = dot(codes, operands[2 * (c * num_parts(PLAN, t) + i)], acc, "ieee")
            if _split(PLAN, t, WIDE, EXACT):
                acc = dot(codes, operands[2 * (c * num_parts(PLAN, t) + i) + 1], acc, "ieee")
    if tier_bits(PLAN, t) == 16:
        return x + acc * unit
    else:
        scale = tl.where(valid, scale, 0.0)
        x += acc * (scale * unit)[:, None]
        return x - scale[:, None] * ones[None, :] if middle(PLAN, t) > 0 else x


@triton.jit(do_not_specialize=["stride_table", "num_reqs"], do_not_specialize_on_alignment=[
    "block_table_ptr", "starts_ptr", "firsts_ptr", "ends_ptr", "cu_seqlens_ptr", "stride_table", "num_reqs",
])  # fmt: skip
def expand_cached_kernel(
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, C] uint8
    block_table_ptr,  # [num_reqs, max_blocks] int32
    starts_ptr,  # [num_reqs] int32, or unused
    firsts_ptr,  # [num_reqs] int32, or unused
    ends_ptr,  # [num_reqs] int32
    cu_seqlens_ptr,  # [num_reqs + 1] int32
    decode_ptr,  # [num_kv_heads, HEAD_DIM, RANK] fp32
    mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    out_ptr,  # [>= cu_seqlens[-1], num_kv_heads, HEAD_DIM] bf16, fp16 or fp32
    stride_table, stride_block, stride_head, stride_m, stride_h, num_reqs,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PLAN: tl.constexpr, WIDE: tl.constexpr, RANGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_D: tl.constexpr,
    D_BLOCKS: tl.constexpr,
):  # fmt: skip
    request, offset = find_tile(tl.program_id(0), cu_seqlens_ptr, num_reqs, TILE * TILES, False)
    head, d = tl.program_id(1) // D_BLOCKS, tl.program_id(1) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    start, first = request * 0, request * 0
    if RANGED:
        start, first = tl.load(starts_ptr + request), tl.load(firsts_ptr + request)
    end = tl.load(ends_ptr + request)
    tile = (start + offset) // TILE
    last_tile = tl.minimum(tile + TILES, tl.cdiv(end, TILE))
    if tile < last_tile:
        decode_ptr += head * (HEAD_DIM * RANK)
        tiers = ()
        for t in tl.static_range(num_tiers(PLAN)):
            tiers = tiers + (_load_tier(decode_ptr, d, PLAN, t, WIDE, EXACT, HEAD_DIM, RANK),)
        mean = tl.load(mean_ptr + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        cache_ptr = kv_cache_ptr + head.to(tl.int64) * stride_head
        table_ptr = block_table_ptr + request.to(tl.int64) * stride_table
        out_ptr += (tl.load(cu_seqlens_ptr + request) - start).to(tl.int64) * stride_m + head * stride_h
        block = load_block(table_ptr, tile, first, end, TILE, BLOCK_SIZE)  # loaded a tile ahead from here on
        for i in range(tile, last_tile):
            position = i * TILE + tl.arange(0, TILE)
            row = position % BLOCK_SIZE
            valid = (position >= first) & (position < end)
            page = page_of(cache_ptr, block, stride_block)
            block = load_block(table_ptr, i + 1, first, end, TILE, BLOCK_SIZE)
            scales = load_scales(page, row, PLAN)
            x = tl.broadcast_to(mean[None, :], [TILE, BLOCK_D])
            for t in tl.static_range(num_tiers(PLAN)):
                x = _expand_tier(x, page, row, valid, scales[t], tiers[t], PLAN, t, WIDE, EXACT)
            out_ptrs = out_ptr + (position.to(tl.int64) * stride_m)[:, None] + d[None, :]
            mask = (position < end)[:, None] & (d < HEAD_DIM)[None, :]
            tl.store(out_ptrs, to_float(x, out_ptr.dtype.element_ty), mask=mask)


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
    starts: Tensor | None = None,
    firsts: Tensor | None = None,
) -> None:
    """Expand cached tokens of every request to head_dim, one request after another in ``out``.

    Args:
        kv_cache: [num_blocks, H, block_size, C] uint8. plan: LatentLayout.plan of the side to expand.
        block_table: [B, max_blocks] int32. seq_lens: [B] int32, where each request ends; 0: its rows are left alone.
        cu_seqlens: [B + 1] int32, where each request starts in ``out``.
        decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [>= cu_seqlens[-1], H, head_dim], bfloat16, float16 or float32. Its row count bounds the launch.
        max_seq_len: upper bound of the tokens that a request expands; 0: nothing to do.
        wide_dtype: of 16-bit tiers.
        starts: [B] int32, the first token of each request that has a row, a multiple of START_MULTIPLE; 0 if None.
        firsts: [B] int32 >= starts, the first token that is read; rows below it become the mean. With ``starts`` only.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    H, block_size = kv_cache.shape[1:3]
    head_dim, rank = decode.shape[1], rank_of(plan)
    check_cache(kv_cache, (plan,))
    num_reqs = check_requests(block_table, seq_lens, cu_seqlens)
    _check_ranges(starts, firsts, num_reqs)
    check_dense("decode", decode, (H, head_dim, rank))
    check_dense("mean", mean, (H, head_dim))
    check_floats("out", out, (out.shape[0], H, head_dim))
    if num_reqs == 0 or max_seq_len == 0 or out.shape[0] == 0:
        return
    exact = out.dtype != torch.bfloat16
    split = exact or (plan[0][0] == 16 and wide_dtype == torch.bfloat16)
    # Wide blocks read the codes less often; D stays within 32 KiB of shared memory, and its rows within the registers.
    block_d = min(128 if rank * (1 + split) <= 128 else 64, max(16, next_power_of_2(head_dim)))
    d_blocks = -(-head_dim // block_d)
    tiles = RUNS[out.shape[0] * H >= LONG_ROWS]
    grid = (num_query_tiles(out.shape[0], num_reqs, out.shape[0], BLOCK_M * tiles), H * d_blocks)
    ranged = starts is not None
    expand_cached_kernel[grid](
        kv_cache, block_table, starts if ranged else seq_lens, firsts if ranged else seq_lens, seq_lens, cu_seqlens,
        decode, mean, out, block_table.stride(0), kv_cache.stride(0), kv_cache.stride(1), out.stride(0), out.stride(1),
        num_reqs,
        HEAD_DIM=head_dim, RANK=rank, PLAN=plan, WIDE=wide_type(wide_dtype), RANGED=ranged, BLOCK_SIZE=block_size,
        EXACT=exact, TILE=BLOCK_M, TILES=tiles, BLOCK_D=block_d, D_BLOCKS=d_blocks,
        num_warps=4, num_stages=2 if split else 3,
    )  # fmt: skip


def _check_ranges(starts: Tensor | None, firsts: Tensor | None, num_reqs: int) -> None:
    for name, tensor in (("starts", starts), ("firsts", firsts)):
        if (tensor is None) != (starts is None):
            raise ValueError(f"{name}: expected starts and firsts together, or neither")
        if tensor is not None:
            check_dense(name, tensor, (num_reqs,), torch.int32)


# ---------------------------------------------------------------- tokens that are not in pages
@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=[
    "query_start_loc_ptr", "ends_ptr", "cu_seqlens_ptr", "num_reqs",
])  # fmt: skip
def copy_fresh_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM], like value and the outputs
    value_ptr,
    query_start_loc_ptr,  # [num_reqs + 1] int32
    ends_ptr,  # [num_reqs] int32
    cu_seqlens_ptr,  # [num_reqs + 1] int32
    key_out_ptr,
    value_out_ptr,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_m, stride_h, num_reqs,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    request, offset = find_tile(tl.program_id(0), query_start_loc_ptr, num_reqs, TILE, False)
    if tl.load(ends_ptr + request) == 0:
        head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
        begin = tl.load(query_start_loc_ptr + request)
        token = offset + tl.arange(0, TILE)
        mask = (token < tl.load(query_start_loc_ptr + request + 1) - begin)[:, None] & (d < HEAD_DIM)[None, :]
        source = (begin + token).to(tl.int64)[:, None]
        target = (
            (tl.load(cu_seqlens_ptr + request) + token).to(tl.int64)[:, None] * stride_m + head * stride_h + d[None, :]
        )
        key = tl.load(key_ptr + source * stride_kt + head * stride_kh + d[None, :], mask=mask)
        tl.store(key_out_ptr + target, key, mask=mask)
        value = tl.load(value_ptr + source * stride_vt + head * stride_vh + d[None, :], mask=mask)
        tl.store(value_out_ptr + target, value, mask=mask)


def copy_fresh(
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    key_out: Tensor,
    value_out: Tensor,
) -> None:
    """Put the keys and values of requests that expand_cached leaves alone, those with seq_lens 0, into the same rows.

    Args:
        key, value: [num_tokens, H, head_dim], one request after another as ``query_start_loc`` [B + 1] int32 says.
        seq_lens: [B] int32. cu_seqlens: [B + 1] int32, where each request starts in the outputs.
        key_out, value_out: [M, H, head_dim], of the inputs' dtype and with one another's strides.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    num_tokens, H, head_dim = key.shape
    num_reqs = check_requests(None, seq_lens, query_start_loc)
    check_requests(None, seq_lens, cu_seqlens)
    for name, tensor, rows in (("value", value, num_tokens), ("key_out", key_out, key_out.shape[0]),
                               ("value_out", value_out, key_out.shape[0])):  # fmt: skip
        check_floats(name, tensor, (rows, H, head_dim))
        if tensor.dtype != key.dtype:
            raise ValueError(f"{name}: expected {key.dtype}, got {tensor.dtype}")
    if key_out.stride() != value_out.stride():
        raise ValueError(f"value_out: expected the strides {key_out.stride()}, got {value_out.stride()}")
    grid = (num_query_tiles(num_tokens, num_reqs, num_tokens, BLOCK_M), H)
    copy_fresh_kernel[grid](
        key, value, query_start_loc, seq_lens, cu_seqlens, key_out, value_out, *key.stride()[:2], *value.stride()[:2],
        *key_out.stride()[:2], num_reqs, HEAD_DIM=head_dim, TILE=BLOCK_M, BLOCK_D=next_power_of_2(head_dim),
        num_warps=4,
    )  # fmt: skip
