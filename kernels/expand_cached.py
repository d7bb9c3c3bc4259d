# SPDX-License-Identifier: Apache-2.0
"""Keys and values of cached tokens, dequantised and expanded to head_dim in one launch, for prefill over cached context.

In: pages, bases, ranges of tokens. Out: k^ = D z + mu and v^ alike, in the model's dtype, one request after another, for
FlashAttention; ``copy_fresh`` puts a step's own tokens beside them. Meaning: reference.dequantize and expand. As in decode,
scales never touch elements: x^ = scale * (D codes - middle * D 1) + mu.

Floor: a token's codes and scales are read, its 16-bit key and value written; at head_dim 128 and ``near_lossless`` 164 + 512
bytes a KV head. A program loads D once, which costs as much as some three of its tiles of tokens.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_cache, check_dense, check_floats, check_pair, next_power_of_2, wide_type
from kvsplice_kernels.dispatch import Binding, Bound, launcher
from kvsplice_kernels.launch import multiprocessors
from kvsplice_kernels.packing import (
    dot,
    floor_power_of_two,
    inverse_power_of_two,
    load_block,
    load_codes,
    load_decode,
    load_scales,
    operand,
    own_columns,
    page_of,
    part_dims,
    to_float,
)
from kvsplice_kernels.plan import Plan, chunk_pad, middle, num_chunks, num_parts, num_tiers, rank_of, tier_bits
from kvsplice_kernels.query_tiles import check_requests, find_tile, num_query_tiles

TILE = 64
START_MULTIPLE = TILE  # of the first token of a range, so that no tile reads two pages where one can hold it
PROGRAMS = 2  # of 4 warps and 240 registers, on a multiprocessor at a time


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
            weights = load_decode(decode_ptr, part_dims(i, PLAN, t, c), own_columns(PLAN, t, c), d, HEAD_DIM, RANK)
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


@triton.jit
def _expand_side(
    kv_cache_ptr, table_ptr, decode_ptr, mean_ptr, out_ptr, stride_block, stride_head, stride_m, stride_h, row, tile,
    last_tile, first, end, head, d, HEAD_DIM: tl.constexpr, PLAN: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tiles [tile, last_tile) of one request, head and side; ``row``: of the output that its token 0 would have."""
    decode_ptr += head * (HEAD_DIM * RANK)
    tiers = ()
    for t in tl.static_range(num_tiers(PLAN)):
        tiers = tiers + (_load_tier(decode_ptr, d, PLAN, t, WIDE, EXACT, HEAD_DIM, RANK),)
    mean = tl.load(mean_ptr + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    cache_ptr = kv_cache_ptr + head.to(tl.int64) * stride_head
    out_ptr += row.to(tl.int64) * stride_m + head * stride_h
    block = load_block(table_ptr, tile, first, end, TILE, BLOCK_SIZE)  # loaded a tile ahead from here on
    for i in range(tile, last_tile):
        position = i * TILE + tl.arange(0, TILE)
        place = position % BLOCK_SIZE
        valid = (position >= first) & (position < end)
        page = page_of(cache_ptr, block, stride_block)
        block = load_block(table_ptr, i + 1, first, end, TILE, BLOCK_SIZE)
        scales = load_scales(page, place, PLAN)
        x = tl.broadcast_to(mean[None, :], [TILE, d.shape[0]])
        for t in tl.static_range(num_tiers(PLAN)):
            x = _expand_tier(x, page, place, valid, scales[t], tiers[t], PLAN, t, WIDE, EXACT)
        out_ptrs = out_ptr + (position.to(tl.int64) * stride_m)[:, None] + d[None, :]
        mask = (position < end)[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(out_ptrs, to_float(x, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_table", "num_reqs", "tiles"], do_not_specialize_on_alignment=[
    "block_table_ptr", "starts_ptr", "firsts_ptr", "ends_ptr", "cu_seqlens_ptr", "stride_table", "num_reqs", "tiles",
])  # fmt: skip
def expand_cached_kernel(
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, C] uint8
    block_table_ptr,  # [num_reqs, max_blocks] int32
    starts_ptr,  # [num_reqs] int32, or unused
    firsts_ptr,  # [num_reqs] int32, or unused
    ends_ptr,  # [num_reqs] int32
    cu_seqlens_ptr,  # [num_reqs + 1] int32
    k_decode_ptr,  # [num_kv_heads, HEAD_DIM, K_RANK] fp32
    k_mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    v_decode_ptr, v_mean_ptr,
    key_ptr,  # [>= cu_seqlens[-1], num_kv_heads, HEAD_DIM] bf16, fp16 or fp32
    value_ptr,
    stride_table, stride_block, stride_head, stride_m, stride_h, num_reqs,
    tiles,  # of a program
    HEAD_DIM: tl.constexpr, K_RANK: tl.constexpr, K_PLAN: tl.constexpr, V_RANK: tl.constexpr, V_PLAN: tl.constexpr,
    WIDE: tl.constexpr, RANGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr,
):  # fmt: skip
    request, offset = find_tile(tl.program_id(0), cu_seqlens_ptr, num_reqs, TILE * tiles, False)
    head, d = tl.program_id(1) // D_BLOCKS, tl.program_id(1) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    start, first = request * 0, request * 0
    if RANGED:
        start, first = tl.load(starts_ptr + request), tl.load(firsts_ptr + request)
    end = tl.load(ends_ptr + request)
    tile = (start + offset) // TILE
    last_tile = tl.minimum(tile + tiles, tl.cdiv(end, TILE))
    if tile < last_tile:
        table_ptr = block_table_ptr + request.to(tl.int64) * stride_table
        row = tl.load(cu_seqlens_ptr + request) - start
        if tl.program_id(2) == 0:
            _expand_side(
                kv_cache_ptr, table_ptr, k_decode_ptr, k_mean_ptr, key_ptr, stride_block, stride_head, stride_m, stride_h,
                row, tile, last_tile, first, end, head, d, HEAD_DIM, K_PLAN, K_RANK, WIDE, BLOCK_SIZE, EXACT, TILE,
            )  # fmt: skip
        else:
            _expand_side(
                kv_cache_ptr, table_ptr, v_decode_ptr, v_mean_ptr, value_ptr, stride_block, stride_head, stride_m,
                stride_h, row, tile, last_tile, first, end, head, d, HEAD_DIM, V_PLAN, V_RANK, WIDE, BLOCK_SIZE, EXACT,
                TILE,
            )  # fmt: skip


class ExpandTiles(NamedTuple):
    """How the expansion of a step is cut into programs."""

    tiles: int  # of TILE tokens, one after another in a program
    block_d: int  # outputs of a program
    d_blocks: int
    num_stages: int


@lru_cache(maxsize=4096)
def expand_tiles(
    num_tiles: int,
    H: int,
    head_dim: int,
    k_plan: Plan,
    v_plan: Plan,
    exact: bool,
    wide_dtype: torch.dtype,
    num_sms: int,
) -> ExpandTiles:
    """As many tiles a program as make one wave of PROGRAMS on each multiprocessor: they share a load of D.

    Wide blocks read the codes less often; D stays within 32 KiB of shared memory, and its rows within the registers.
    """
    block_d, num_stages = max(16, next_power_of_2(head_dim)), 3
    for plan in (k_plan, v_plan):
        split = exact or (plan[0][0] == 16 and wide_dtype == torch.bfloat16)
        block_d = min(block_d, 128 if rank_of(plan) * (1 + split) <= 128 else 64)
        num_stages = 2 if split else num_stages
    d_blocks = -(-head_dim // block_d)
    return ExpandTiles(-(-num_tiles * 2 * H * d_blocks // (PROGRAMS * num_sms)), block_d, d_blocks, num_stages)


def bind_expand(
    kv_cache: Tensor,
    k_plan: Plan,
    v_plan: Plan,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    k_basis: tuple[Tensor, Tensor],
    v_basis: tuple[Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    max_seq_len: int,
    wide_dtype: torch.dtype = torch.bfloat16,
    starts: Tensor | None = None,
    firsts: Tensor | None = None,
) -> Binding:
    """Expand cached tokens of every request to head_dim, one request after another in ``key`` and ``value``.

    Args:
        kv_cache: [num_blocks, H, block_size, C] uint8. k_plan, v_plan: LatentLayout.plan("k" | "v", block_size).
        block_table: [B, max_blocks] int32. seq_lens: [B] int32, where each request ends; 0: its rows are left alone.
        cu_seqlens: [B + 1] int32, where each request starts in the outputs.
        k_basis, v_basis: decode [H, head_dim, rank] and mean [H, head_dim], fp32.
        key, value: [>= cu_seqlens[-1], H, head_dim], bfloat16, float16 or float32, of one dtype and one another's strides.
            Their row count bounds the launch.
        max_seq_len: upper bound of the tokens that a request expands; 0: nothing to do.
        wide_dtype: of 16-bit tiers.
        starts: [B] int32, the first token of each request that has a row, a multiple of START_MULTIPLE; 0 if None.
        firsts: [B] int32 >= starts, the first token that is read; rows below it become the mean. With ``starts`` only.
    Returns:
        The launch of tensors of these shapes and strides, and these, in the order that it takes.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    H, block_size = kv_cache.shape[1:3]
    num_rows, head_dim = key.shape[0], k_basis[0].shape[1]
    k_rank, v_rank = rank_of(k_plan), rank_of(v_plan)
    check_cache(kv_cache, (k_plan, v_plan))
    num_reqs = check_requests(block_table, seq_lens, cu_seqlens)
    _check_ranges(starts, firsts, num_reqs)
    for side, (decode, mean), rank in (("k", k_basis, k_rank), ("v", v_basis, v_rank)):
        check_dense(f"{side}_decode", decode, (H, head_dim, rank))
        check_dense(f"{side}_mean", mean, (H, head_dim))
    check_pair("key", key, "value", value, (num_rows, H, head_dim))
    exact = key.dtype != torch.bfloat16
    num_tiles = -(-num_rows // TILE)
    cut = expand_tiles(num_tiles, H, head_dim, k_plan, v_plan, exact, wide_dtype, multiprocessors(key.device))
    wanted = num_reqs > 0 and max_seq_len > 0 and num_rows > 0
    programs = num_query_tiles(num_rows, num_reqs, num_rows, TILE * cut.tiles) if wanted else 0
    ranges = (seq_lens, seq_lens) if starts is None or firsts is None else (starts, firsts)
    bound = Bound(
        expand_cached_kernel, (programs, H * cut.d_blocks, 2), block_table.stride(0), kv_cache.stride(0), kv_cache.stride(1), key.stride(0),
        key.stride(1), num_reqs, cut.tiles,
        HEAD_DIM=head_dim, K_RANK=k_rank, K_PLAN=k_plan, V_RANK=v_rank, V_PLAN=v_plan, WIDE=wide_type(wide_dtype),
        RANGED=starts is not None, BLOCK_SIZE=block_size, EXACT=exact, TILE=TILE, BLOCK_D=cut.block_d, D_BLOCKS=cut.d_blocks,
        num_warps=4, num_stages=cut.num_stages,
    )  # fmt: skip
    return bound, (kv_cache, block_table, *ranges, seq_lens, cu_seqlens, *k_basis, *v_basis, key, value)


expand_cached = launcher(bind_expand)


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


def bind_copy(
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor,
    key_out: Tensor,
    value_out: Tensor,
) -> Binding:
    """Put the keys and values of requests that expand_cached leaves alone, those with seq_lens 0, into the same rows.

    Args:
        key, value: [num_tokens, H, head_dim], one request after another as ``query_start_loc`` [B + 1] int32 says.
        seq_lens: [B] int32. cu_seqlens: [B + 1] int32, where each request starts in the outputs.
        key_out, value_out: [M, H, head_dim], of the inputs' dtype and with one another's strides.
    Returns:
        The launch of tensors of these shapes and strides, and these, in the order that it takes.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    num_tokens, H, head_dim = key.shape
    num_reqs = check_requests(None, seq_lens, query_start_loc)
    check_requests(None, seq_lens, cu_seqlens)
    check_floats("value", value, (num_tokens, H, head_dim))
    check_pair("key_out", key_out, "value_out", value_out, (key_out.shape[0], H, head_dim))
    for name, tensor in (("value", value), ("key_out", key_out)):
        if tensor.dtype != key.dtype:
            raise ValueError(f"{name}: expected {key.dtype}, got {tensor.dtype}")
    grid = (num_query_tiles(num_tokens, num_reqs, num_tokens, TILE), H)
    bound = Bound(
        copy_fresh_kernel, grid, *key.stride()[:2], *value.stride()[:2], *key_out.stride()[:2], num_reqs, HEAD_DIM=head_dim, TILE=TILE, BLOCK_D=next_power_of_2(head_dim),
        num_warps=4,
    )  # fmt: skip
    return bound, (key, value, query_start_loc, seq_lens, cu_seqlens, key_out, value_out)


copy_fresh = launcher(bind_copy)
