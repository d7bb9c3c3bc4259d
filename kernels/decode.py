# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of attention over compressed pages: one program for (tile of queries, KV head, split of the keys).

In: q_latent and q_bias of project_query, pages that cache_write filled. Out: (latent, lse) of every split for
reduce_expand. Meaning: reference.attend. A program's rows are the query tokens of its tile times the heads that share
the KV head, so decode steps, speculative tokens and chunked prefill take the same path.

Scales never touch elements: K adds scale * (q.codes) + zero * sum(q) to a logit; V multiplies p by the scale before the
dot and adds p * zero once for all dimensions of a tier. The logic follows Flash-Decoding,
https://pytorch.org/blog/flash-decoding/, with the exponent taken in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_cache, check_dense, wide_type
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
    to_float,
)
from kvsplice_kernels.plan import (
    Plan,
    chunk_pad,
    chunk_part,
    has_zero,
    num_chunks,
    num_parts,
    num_tiers,
    rank_of,
    tier_bits,
)
from kvsplice_kernels.query_tiles import check_requests, find_tile, num_query_tiles, request_lens

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# p * scale fills fp16 up to 2**15: tokens whose scale is 2**-29 of the greatest one still count.
HEADROOM = tl.constexpr(16384.0)


# ---------------------------------------------------------------- queries
@triton.jit
def _load_query(q_ptrs, row_ok, PLAN: tl.constexpr):
    """q_latent as fp32 parts [M, PAD], and the power of two below each row's greatest magnitude [M]."""
    parts = ()
    greatest = tl.zeros(row_ok.shape, tl.float32)
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            for i in tl.static_range(num_parts(PLAN, t)):
                dims = part_dims(i, PLAN, t, c)
                inside = own_columns(PLAN, t, c)
                q = tl.load(q_ptrs[:, None] + dims[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
                greatest = tl.maximum(greatest, tl.max(tl.abs(q), 1))
                parts = parts + (q,)
    return parts, floor_power_of_two(greatest)


@triton.jit
def _cast_query(parts, unit, PLAN: tl.constexpr, WIDE: tl.constexpr):
    """Rows in units of ``unit`` (exact) as dot operands, and for each tier their sum as rounded [M]."""
    inverse = inverse_power_of_two(unit)[:, None]
    cast, sums = (), ()
    for t in tl.static_range(num_tiers(PLAN)):
        total = tl.zeros(unit.shape, tl.float32)
        for c in tl.static_range(num_chunks(PLAN, t)):
            for i in tl.static_range(num_parts(PLAN, t)):
                q = parts[chunk_part(PLAN, t, c) + i] * inverse
                q = to_float(q, WIDE if tier_bits(PLAN, t) == 16 else tl.float16)
                total += tl.sum(q.to(tl.float32), 1)
                cast = cast + (q,)
        sums = sums + (total,)
    return cast, sums


# ---------------------------------------------------------------- keys
@triton.jit
def _tier_logits(x, q, q_sum, page, row, valid, scale, zero, PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr):
    """x [M, TILE] plus one tier's share of q.k^. K is loaded as [dims, tokens], the orientation the dot wants."""
    u = tl.zeros(x.shape, tl.float32)
    for c in tl.static_range(num_chunks(PLAN, t)):
        raw = load_codes(page, row, valid, PLAN, t, c, WIDE, True)
        for i in tl.static_range(num_parts(PLAN, t)):
            u = dot(q[chunk_part(PLAN, t, c) + i], operand(raw, i, PLAN, t), u, "ieee")
    if tier_bits(PLAN, t) == 16:
        return x + u
    else:  # scales of foreign rows may be NaN: select, the codes are finite whatever the bytes
        x += u * tl.where(valid, scale, 0.0).to(tl.float32)[None, :]
        if has_zero(PLAN, t):
            x += q_sum[:, None] * tl.where(valid, zero, 0.0).to(tl.float32)[None, :]
        return x


# ---------------------------------------------------------------- values
@triton.jit
def _init_values(PLAN: tl.constexpr, M: tl.constexpr):
    """(accumulators [M, PAD] of every part, zero-point sums [M] of every tier, scale units of every tier)."""
    acc, zero_sum, units = (), (), ()
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            for _ in tl.static_range(num_parts(PLAN, t)):
                acc = acc + (tl.zeros([M, chunk_pad(PLAN, t, c)], tl.float32),)
        zero_sum = zero_sum + (tl.zeros([M], tl.float32),)
        units = units + (floor_power_of_two(tl.max(tl.zeros([M], tl.float32), 0)),)
    return acc, zero_sum, units


@triton.jit
def _weigh(p, alpha, unit, valid, scale, PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr):
    """p * scale as a dot operand in units of ``unit``, the greatest scale so far down to a power of two.

    Returns (operand [M, TILE], factor [M] for what was accumulated before, new unit).
    """
    if tier_bits(PLAN, t) == 16:
        return to_float(p * HEADROOM, WIDE), alpha, unit
    else:
        s = tl.where(valid, scale, 0.0).to(tl.float32)
        new_unit = tl.maximum(unit, floor_power_of_two(tl.max(s, 0)))
        inverse = inverse_power_of_two(new_unit)
        return (p * (s * (inverse * HEADROOM))[None, :]).to(tl.float16), alpha * (unit * inverse), new_unit


@triton.jit
def _add_values(
    acc, zero_sum, unit, p, alpha, page, row, valid, scale, zero,
    PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tier's share of sum_t p_t z_t: its accumulators, its zero-point sum and its unit, all moved on by one tile."""
    weights, factor, unit = _weigh(p, alpha, unit, valid, scale, PLAN, t, WIDE)
    new = ()
    for c in tl.static_range(num_chunks(PLAN, t)):
        raw = load_codes(page, row, valid, PLAN, t, c, WIDE, False)
        for i in tl.static_range(num_parts(PLAN, t)):
            old = acc[chunk_part(PLAN, t, c) + i] * factor[:, None]
            new = new + (dot(weights, operand(raw, i, PLAN, t), old, "ieee"),)
    if has_zero(PLAN, t):
        z = tl.where(valid, zero, 0.0).to(tl.float32)
        zero_sum = zero_sum * alpha + tl.sum(p * z[None, :], 1)
    return new, zero_sum, unit


@triton.jit
def _store_latent(latent_ptrs, row_ok, acc, zero_sum, units, inverse_sum, PLAN: tl.constexpr):
    """Normalise and store the split's latent, zero points added."""
    for t in tl.static_range(num_tiers(PLAN)):
        unit = units[t] / HEADROOM if tier_bits(PLAN, t) < 16 else 1.0 / HEADROOM
        for c in tl.static_range(num_chunks(PLAN, t)):
            for i in tl.static_range(num_parts(PLAN, t)):
                dims = part_dims(i, PLAN, t, c)
                inside = own_columns(PLAN, t, c)
                z = acc[chunk_part(PLAN, t, c) + i] * unit + zero_sum[t][:, None]
                mask = row_ok[:, None] & inside[None, :]
                tl.store(latent_ptrs[:, None] + dims[None, :], z * inverse_sum[:, None], mask=mask)


# ---------------------------------------------------------------- one program
@triton.jit
def _softmax_step(x, m, row_sum):
    """One tile of online softmax in base 2: (p, factor for what was accumulated, new maximum, new sum)."""
    new_m = tl.maximum(m, tl.max(x, 1))
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    alpha = tl.exp2(m - safe_m)
    p = tl.exp2(x - safe_m[:, None])
    return p, alpha, new_m, row_sum * alpha + tl.sum(p, 1)


@triton.jit
def _attend(
    q_ptrs, row_ok, q_position, bias, cache_ptr, table_ptr, latent_ptrs, lse_ptrs,
    stride_block, scale, soft_cap, first_token, end_token, tile, last_tile,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, WIDE: tl.constexpr,
    K_PLAN: tl.constexpr, V_PLAN: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attend the rows to the tokens [first_token, end_token) of the tiles [tile, last_tile) and store (latent, lse)."""
    parts, q_unit = _load_query(q_ptrs, row_ok, K_PLAN)
    q, q_sums = _cast_query(parts, q_unit, K_PLAN, WIDE)
    acc, zero_sum, units = _init_values(V_PLAN, M)
    m = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    t = tl.arange(0, TILE)
    # Block ids and scales are loaded a tile ahead into registers: too narrow for asynchronous copies.
    block = load_block(table_ptr, tile, first_token, end_token, TILE, BLOCK_SIZE)
    page = page_of(cache_ptr, block, stride_block)
    k_scales = load_scales(page, (tile * TILE + t) % BLOCK_SIZE, K_PLAN)
    v_scales = load_scales(page, (tile * TILE + t) % BLOCK_SIZE, V_PLAN)
    block = load_block(table_ptr, tile + 1, first_token, end_token, TILE, BLOCK_SIZE)
    for i in range(tile, last_tile):
        position = i * TILE + t
        row = position % BLOCK_SIZE
        valid = (position >= first_token) & (position < end_token)
        next_page = page_of(cache_ptr, block, stride_block)
        next_k = load_scales(next_page, (position + TILE) % BLOCK_SIZE, K_PLAN)
        next_v = load_scales(next_page, (position + TILE) % BLOCK_SIZE, V_PLAN)
        block = load_block(table_ptr, i + 2, first_token, end_token, TILE, BLOCK_SIZE)

        x = tl.zeros([M, TILE], tl.float32)
        for j in tl.static_range(num_tiers(K_PLAN)):
            x = _tier_logits(x, q, q_sums[j], page, row, valid, k_scales[2 * j], k_scales[2 * j + 1], K_PLAN, j, WIDE)
        if SOFT_CAP:
            x = (x * q_unit[:, None] + bias[:, None]) * (scale / soft_cap)
            x = _tanh(x) * (soft_cap * LOG2E)
        else:
            x = x * (q_unit * (scale * LOG2E))[:, None]
        distance = q_position[:, None] - position[None, :]
        seen = (distance >= 0) & valid[None, :]
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        p, alpha, m, row_sum = _softmax_step(tl.where(seen, x, float("-inf")), m, row_sum)

        new_acc, new_zero_sum, new_units = (), (), ()
        for j in tl.static_range(num_tiers(V_PLAN)):
            part, z, unit = _add_values(
                acc, zero_sum[j], units[j], p, alpha, page, row, valid, v_scales[2 * j], v_scales[2 * j + 1],
                V_PLAN, j, WIDE,
            )  # fmt: skip
            new_acc, new_zero_sum, new_units = new_acc + part, new_zero_sum + (z,), new_units + (unit,)
        acc, zero_sum, units = new_acc, new_zero_sum, new_units
        page, k_scales, v_scales = next_page, next_k, next_v

    any_seen = row_sum > 0
    safe_sum = tl.where(any_seen, row_sum, 1.0)
    lse = m * LN2 + tl.log(safe_sum)
    if not SOFT_CAP:
        lse += bias * scale
    tl.store(lse_ptrs, tl.where(any_seen, lse, float("-inf")), mask=row_ok)
    inverse_sum = tl.where(any_seen, 1.0 / safe_sum, 0.0)
    _store_latent(latent_ptrs, row_ok, acc, zero_sum, units, inverse_sum, V_PLAN)


@triton.jit
def _tanh(x):
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit(
    do_not_specialize=["num_reqs", "num_splits", "stride_table"],
    # A step's prefills start anywhere in the batch: their alignment must not be a variant.
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"],
)
def decode_kernel(
    q_latent_ptr,  # [num_tokens, num_heads, K_RANK] fp32
    q_bias_ptr,  # [num_tokens, num_heads] fp32
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, C] uint8
    block_table_ptr,  # [num_reqs, max_blocks] int32; entries past a sequence's end may hold anything
    seq_lens_ptr,  # [num_reqs] int32, this step's tokens included
    query_start_loc_ptr,  # [num_reqs + 1] int32
    latent_ptr,  # [num_tokens, num_heads, num_splits, V_RANK] fp32
    lse_ptr,  # [num_tokens, num_heads, num_splits] fp32, natural log, -inf where the split is empty
    num_reqs, num_splits, stride_table, stride_block, stride_head, scale, soft_cap,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, WIDE: tl.constexpr,
    SKIP_FIRST_CHUNKS: tl.constexpr, ONE_TILE: tl.constexpr,
    K_RANK: tl.constexpr, K_PLAN: tl.constexpr,
    V_RANK: tl.constexpr, V_PLAN: tl.constexpr,
    TILE_TOKENS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    split, kv_head = tl.program_id(0) % num_splits, tl.program_id(1)
    request, first_query = find_tile(
        tl.program_id(0) // num_splits, query_start_loc_ptr, num_reqs, TILE_TOKENS, ONE_TILE
    )
    start, query_len, seq_len = request_lens(request, query_start_loc_ptr, seq_lens_ptr)
    live = (first_query < query_len) & (seq_len > 0)
    if SKIP_FIRST_CHUNKS:
        live = live & (seq_len != query_len)
    if live:
        r = tl.arange(0, M)
        query = first_query + r // GROUP
        row_ok = (r < TILE_TOKENS * GROUP) & (query < query_len)
        row = (start + query).to(tl.int64) * (tl.num_programs(1) * GROUP) + kv_head * GROUP + r % GROUP
        q_position = seq_len - query_len + query
        end_token = tl.minimum(seq_len, seq_len - query_len + first_query + TILE_TOKENS)
        first_token = 0
        if WINDOW > 0:
            first_token = tl.maximum(seq_len - query_len + first_query - WINDOW + 1, 0)
        first_tile, tiles_end = first_token // TILE, tl.cdiv(end_token, TILE)
        per_split = tl.cdiv(tl.maximum(tiles_end - first_tile, 0), num_splits)
        tile = first_tile + split * per_split
        last_tile = tl.minimum(tile + per_split, tiles_end)
        lse_ptrs = lse_ptr + row * num_splits + split
        if tile < last_tile:
            _attend(
                q_latent_ptr + row * K_RANK, row_ok, q_position,
                tl.load(q_bias_ptr + row, mask=row_ok, other=0.0),
                kv_cache_ptr + kv_head.to(tl.int64) * stride_head,
                block_table_ptr + request.to(tl.int64) * stride_table,
                latent_ptr + (row * num_splits + split) * V_RANK, lse_ptrs,
                stride_block, scale, soft_cap, first_token, end_token, tile, last_tile,
                BLOCK_SIZE, WINDOW, SOFT_CAP, WIDE, K_PLAN, V_PLAN, M, TILE,
            )  # fmt: skip
        else:
            tl.store(lse_ptrs, tl.full([M], float("-inf"), tl.float32), mask=row_ok)


# ---------------------------------------------------------------- launcher
def query_tile(group: int, max_query_len: int, ranks: int) -> tuple[int, int]:
    """(query tokens of a tile, rows of its dot): as many tokens as fill 64 rows, no more than a request has.

    16 rows where K and V have more than 256 latent dimensions together: there the 64-row program that Triton 3.6 makes
    for sm_90 attends wrongly (tests/gpu_check.py, prefill-256, H200, 2026-11-24); 16-row programs of that width were right
    there (2-bit-tiers-256).
    """
    rows = 64 if ranks <= 256 else 16
    tokens = min(triton.next_power_of_2(max_query_len), max(1, rows // group))  # few variants to compile
    return tokens, max(16, triton.next_power_of_2(tokens * group))


def decode(
    q_latent: Tensor,
    q_bias: Tensor,
    kv_cache: Tensor,
    k_plan: Plan,
    v_plan: Plan,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    latent: Tensor,
    lse: Tensor,
    scale: float,
    max_query_len: int,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    wide_dtype: torch.dtype = torch.bfloat16,
    skip_first_chunks: bool = False,
) -> None:
    """Causal attention on the codes, split over the keys, writing into ``latent`` and ``lse``.

    Splits are contiguous runs of tiles of what a query tile can see. Rows of no request, of a request with seq_len 0
    and, with ``skip_first_chunks``, of requests without earlier context (seq_len == query_len) are not written; nor is
    the latent of an empty split, whose lse is -inf. Nothing waits for the GPU, and the grid depends on shapes,
    ``max_query_len`` and the split count alone, so that it can be captured in a CUDA graph.

    Args:
        q_latent: [T, num_heads, k_rank], q_bias: [T, num_heads], fp32, of project_query.
        kv_cache: [num_blocks, H, block_size, C] uint8. k_plan, v_plan: LatentLayout.plan("k" | "v", block_size).
        block_table: [B, max_blocks] int32. seq_lens: [B] int32, new tokens included. query_start_loc: [B + 1] int32.
        latent: [T, num_heads, num_splits, v_rank] fp32. lse: [T, num_heads, num_splits] fp32, natural log.
        scale: softmax scale. max_query_len: upper bound of the requests' query tokens.
        sliding_window: a query sees keys at distance < sliding_window. soft_cap: logits become cap * tanh(logit / cap).
        wide_dtype: of 16-bit tiers.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    T, num_heads, k_rank = q_latent.shape
    H, block_size, num_splits, v_rank = kv_cache.shape[1], kv_cache.shape[2], lse.shape[-1], rank_of(v_plan)
    check_cache(kv_cache, (k_plan, v_plan))
    num_reqs = check_requests(block_table, seq_lens, query_start_loc)
    check_dense("q_latent", q_latent, (T, num_heads, rank_of(k_plan)))
    check_dense("q_bias", q_bias, (T, num_heads))
    check_dense("latent", latent, (T, num_heads, num_splits, v_rank))
    check_dense("lse", lse, (T, num_heads, num_splits))
    if num_heads % H:
        raise ValueError(f"q_latent: expected a multiple of {H} heads, got {num_heads}")
    if T == 0 or num_reqs == 0:
        return
    tile_tokens, rows = query_tile(num_heads // H, max_query_len, k_rank + v_rank)
    tiles = num_query_tiles(T, num_reqs, max_query_len, tile_tokens)
    decode_kernel[(tiles * num_splits, H)](
        q_latent, q_bias, kv_cache, block_table, seq_lens, query_start_loc, latent, lse,
        num_reqs, num_splits, block_table.stride(0), kv_cache.stride(0), kv_cache.stride(1), scale, soft_cap or 1.0,
        GROUP=num_heads // H, BLOCK_SIZE=block_size, WINDOW=sliding_window or 0, SOFT_CAP=bool(soft_cap),
        WIDE=wide_type(wide_dtype), SKIP_FIRST_CHUNKS=skip_first_chunks, ONE_TILE=max_query_len <= tile_tokens,
        K_RANK=k_rank, K_PLAN=k_plan, V_RANK=v_rank, V_PLAN=v_plan,
        TILE_TOKENS=tile_tokens, M=rows, **launch_shape(rows, k_rank + v_rank),
    )  # fmt: skip


def launch_shape(rows: int, ranks: int) -> dict[str, int]:
    """Tokens of a key tile and launch options: a warp for 16 rows, as more would only hold copies of them.

    Tiles are as large as registers allow (ptxas, sm_90): from 64 rows on, or a k_rank + v_rank above 256, 64 spills much.
    """
    tile = 64 if rows <= 32 and ranks <= 256 else 32
    return {"TILE": tile, "num_warps": min(8, rows // 16), "num_stages": 3 if rows == 16 else 2}
