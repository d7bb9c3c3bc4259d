# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of attention over compressed pages: one program for (tile of queries, KV head, split of the keys).

In: q_latent and q_bias of project_query, pages that cache_write filled. Out: (latent, lse) of every split for
reduce_expand. Meaning: reference.attend. A program's columns are the query tokens of its tile times the heads that share
the KV head, so decode steps, speculative tokens and chunked prefill take the same path.

Tokens are the rows of both dots, S^T = K q^T and z^T = V^T p^T, so that one warp holds 8 query heads without padding them
to 16 (operands.py has the operands). Queries are pairs of int8, high and low, about 15 bits of each row's greatest
magnitude. Scales never touch elements: K adds scale * (q.codes - middle * sum(q)) to a logit; V multiplies p by the scale
before the dot and takes middle * sum(p * scale) off once for all dimensions of a tier. The logic follows Flash-Decoding,
https://pytorch.org/blog/flash-decoding/, with the exponent taken in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.accumulate import (
    MAX_EXPONENT,
    add_values,
    add_weights,
    by_eights,
    greatest_scale,
    init_values,
    scaled,
    scaled_sums,
    store_latent,
    weights_of,
)
from kvsplice_kernels.checks import check_cache, check_dense, next_power_of_2, wide_type
from kvsplice_kernels.decode_rows import attend_rows
from kvsplice_kernels.dispatch import Binding, Bound, launcher
from kvsplice_kernels.launch import Launch, default_launch, has_rows
from kvsplice_kernels.logits import Q_STEP, cast_query, load_query, logits
from kvsplice_kernels.operands import SUB, load_scales, pages_of
from kvsplice_kernels.packing import floor_power_of_two, inverse_power_of_two, page_of, tanh
from kvsplice_kernels.pdl import launch_dependents, pdl_options, wait
from kvsplice_kernels.plan import Plan, rank_of
from kvsplice_kernels.query_tiles import check_requests, find_tile, num_query_tiles, request_lens
from kvsplice_kernels.row_operands import column_order

TILE, ROWS_TILE = 32, 64  # tokens of a key tile; where queries are the rows
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-1e30)  # stands in for -inf, of which another -inf cannot be taken


# ---------------------------------------------------------------- one program
@triton.jit
def _load_blocks(table_ptr, tile, first, end, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block ids of a tile's sub-tiles, or of the whole tile if it lies in one page; 0 where no token of [first, end)."""
    blocks = ()
    STEP: tl.constexpr = TILE if BLOCK_SIZE % TILE == 0 else SUB
    for s in tl.static_range(TILE // STEP):
        position = tile * TILE + s * STEP
        wanted = (position + STEP > first) & (position < end)
        blocks = blocks + (tl.load(table_ptr + position // BLOCK_SIZE, mask=wanted, other=0),)
    return blocks


@triton.jit
def _pages(cache_ptr, blocks, stride_block):
    """Page pointers of block ids."""
    pages = ()
    for s in tl.static_range(len(blocks)):
        pages = pages + (page_of(cache_ptr, blocks[s], stride_block),)
    return pages


@triton.jit
def _row_of(position, BLOCK_SIZE: tl.constexpr):
    """Row in its page of a token; unsigned, where a power of two costs one instruction."""
    return (position.to(tl.uint32) % BLOCK_SIZE).to(tl.int32)


@triton.jit
def _shift(m, factor):
    """What online softmax in base 2 takes off its exponents, m [N] in units of 1 / factor."""
    return tl.where(m == float("-inf"), 0.0, m) * factor


@triton.jit
def _capped(x, factor, bias, soft_cap):
    """soft_cap * tanh(logit / soft_cap) in units of 1 / factor, -inf kept."""
    capped = tanh((x * factor[None, :] + bias[None, :]) / soft_cap) * soft_cap
    return tl.where(x == float("-inf"), float("-inf"), capped)


@triton.jit
def _attend(
    q_ptrs, row_ok, q_position, bias, cache_ptr, table_ptr, latent_ptrs, lse_ptrs,
    stride_block, scale, soft_cap, first_token, end_token, tile, last_tile,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, WIDE: tl.constexpr,
    ONE_QUERY: tl.constexpr, K_PLAN: tl.constexpr, V_PLAN: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attend the rows to the tokens [first_token, end_token) of the tiles [tile, last_tile) and store (latent, lse)."""
    parts, q_unit = load_query(q_ptrs, row_ok, K_PLAN)
    q, q_sums = cast_query(parts, q_unit, K_PLAN, WIDE)
    step = q_unit * (Q_STEP * scale)  # of a logit
    factor = step * LOG2E
    if SOFT_CAP:
        factor = tl.full([N], LOG2E, tl.float32)
    acc, sums = init_values(V_PLAN, N)
    unit = floor_power_of_two(tl.max(tl.zeros([SUB], tl.float32), 0))
    m = tl.full([N], float("-inf"), tl.float32)
    row_sum = tl.zeros([8, N], tl.float32)
    token = tl.arange(0, TILE)
    pair = tl.arange(0, TILE // 2)
    pair_token = pair // 8 * 16 + pair % 8
    # Block ids are loaded two tiles ahead: the asynchronous copies of the next tile must know their pages.
    pages = _pages(cache_ptr, _load_blocks(table_ptr, tile, first_token, end_token, TILE, BLOCK_SIZE), stride_block)
    blocks = _load_blocks(table_ptr, tile + 1, first_token, end_token, TILE, BLOCK_SIZE)
    for i in range(tile, last_tile):
        page, pair_page = pages_of(pages, token), pages_of(pages, pair_token)
        pages = _pages(cache_ptr, blocks, stride_block)
        blocks = _load_blocks(table_ptr, i + 2, first_token, end_token, TILE, BLOCK_SIZE)
        position = i * TILE + token
        row = _row_of(position, BLOCK_SIZE)
        valid = (position >= first_token) & (position < end_token)
        x = logits(q, q_sums, page, row, position, valid, q_position, ONE_QUERY, WINDOW, K_PLAN, WIDE)
        if SOFT_CAP:
            x = _capped(x, step, bias * scale, soft_cap)
        codes = load_scales(page, row, V_PLAN)
        tile_m, new_unit = tl.max(x, 0), greatest_scale(unit, codes, valid, V_PLAN)
        grown = tl.max((tile_m - tl.maximum(m, LEAST)) * factor, 0) > MAX_EXPONENT
        # Where there are many columns, a branch around so many registers makes the assembler spill them.
        if grown | (new_unit > unit) | (N > 16):
            new_m = tl.maximum(m, tile_m)
            alpha = tl.exp2(m * factor - _shift(new_m, factor))
            shrink = alpha * (unit * inverse_power_of_two(new_unit))
            acc, sums = scaled(acc, shrink, alpha, V_PLAN), scaled_sums(sums, shrink, V_PLAN)
            row_sum, m, unit = row_sum * alpha[None, :], new_m, new_unit
        p = tl.exp2(x * factor[None, :] - _shift(m, factor)[None, :])
        row_sum += by_eights(p)
        weights = weights_of(p, inverse_power_of_two(unit), codes, V_PLAN)
        pair_row = _row_of(i * TILE + pair_token, BLOCK_SIZE)
        acc = add_values(acc, weights, page, row, pair_page, pair_row, valid, V_PLAN, WIDE)
        sums = add_weights(sums, weights, V_PLAN)

    total = tl.sum(row_sum, 0)
    any_seen = total > 0
    safe_sum = tl.where(any_seen, total, 1.0)
    lse = m * factor * LN2 + tl.log(safe_sum)
    if not SOFT_CAP:
        lse += bias * scale
    tl.store(lse_ptrs, tl.where(any_seen, lse, float("-inf")), mask=row_ok)
    inverse_sum = tl.where(any_seen, 1.0 / safe_sum, 0.0)
    store_latent(latent_ptrs, row_ok, acc, sums, unit, inverse_sum, V_PLAN)


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
    TILE_TOKENS: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    launch_dependents(PDL)
    split, kv_head = tl.program_id(0) % num_splits, tl.program_id(1)
    request, first_query = find_tile(
        tl.program_id(0) // num_splits, query_start_loc_ptr, num_reqs, TILE_TOKENS, ONE_TILE
    )
    start, query_len, seq_len = request_lens(request, query_start_loc_ptr, seq_lens_ptr)
    live = (first_query < query_len) & (seq_len > 0)
    if SKIP_FIRST_CHUNKS:
        live = live & (seq_len != query_len)
    if live:
        r = tl.arange(0, N)
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
            if ROWS:  # both calls written out: with these bound to names before, ptxas spills more in the other
                attend_rows(
                    q_latent_ptr + row * K_RANK, row_ok, q_position,
                    tl.load(q_bias_ptr + row, mask=row_ok, other=0.0),
                    kv_cache_ptr + kv_head.to(tl.int64) * stride_head,
                    block_table_ptr + request.to(tl.int64) * stride_table,
                    latent_ptr + (row * num_splits + split) * V_RANK, lse_ptrs,
                    stride_block, scale, soft_cap, first_token, end_token, tile, last_tile,
                    BLOCK_SIZE, WINDOW, SOFT_CAP, WIDE, K_PLAN, V_PLAN, N, TILE,
                )  # fmt: skip
            else:
                _attend(
                    q_latent_ptr + row * K_RANK, row_ok, q_position,
                    tl.load(q_bias_ptr + row, mask=row_ok, other=0.0),
                    kv_cache_ptr + kv_head.to(tl.int64) * stride_head,
                    block_table_ptr + request.to(tl.int64) * stride_table,
                    latent_ptr + (row * num_splits + split) * V_RANK, lse_ptrs,
                    stride_block, scale, soft_cap, first_token, end_token, tile, last_tile,
                    BLOCK_SIZE, WINDOW, SOFT_CAP, WIDE, TILE_TOKENS == 1, K_PLAN, V_PLAN, N, TILE,
                )  # fmt: skip
        else:
            tl.store(lse_ptrs, tl.full([N], float("-inf"), tl.float32), mask=row_ok)


# ---------------------------------------------------------------- launcher
def query_tile(group: int, max_query_len: int) -> tuple[int, int]:
    """(query tokens of a tile, columns of its dots): as many tokens as fill 64 columns, no more than a request has."""
    tokens = min(next_power_of_2(max_query_len), max(1, 64 // group))  # few variants to compile
    return tokens, max(8, next_power_of_2(tokens * group))


def launched_tile(group: int, max_query_len: int, launch: Launch | None) -> tuple[int, int]:
    """The same for a launch: with queries as rows, as many tokens as fill ``launch.rows``, and those rows."""
    if launch is None or launch.rows is None:
        return query_tile(group, max_query_len)
    tokens = min(next_power_of_2(max_query_len), max(1, launch.rows // group))
    return tokens, max(launch.rows, next_power_of_2(tokens * group))


def latent_ranks(k_plan: Plan, v_plan: Plan, launch: Launch | None) -> tuple[int, int]:
    """k_rank of q_latent and v_rank of latent, as a launch (None: the default) has them: with queries as rows the columns of
    its operands, padding counted."""
    if has_rows(launch):
        return len(column_order(k_plan)), len(column_order(v_plan))
    return rank_of(k_plan), rank_of(v_plan)


def bind_decode(
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
    launch: Launch | None = None,
) -> Binding:
    """Causal attention on the codes, split over the keys, writing into ``latent`` and ``lse``.

    Splits are contiguous runs of tiles of what a query tile can see. Rows of no request, of a request with seq_len 0
    and, with ``skip_first_chunks``, of requests without earlier context (seq_len == query_len) are not written; nor is
    the latent of an empty split, whose lse is -inf. Nothing waits for the GPU, and the grid depends on shapes,
    ``max_query_len`` and the split count alone, so that it can be captured in a CUDA graph.

    Args:
        q_latent: [T, num_heads, k_rank], see latent_ranks, q_bias: [T, num_heads], fp32, of project_query.
        kv_cache: [num_blocks, H, block_size, C] uint8. k_plan, v_plan: LatentLayout.plan("k" | "v", block_size).
        block_table: [B, max_blocks] int32. seq_lens: [B] int32, new tokens included. query_start_loc: [B + 1] int32.
        latent: [T, num_heads, num_splits, v_rank] fp32. lse: [T, num_heads, num_splits] fp32, natural log.
        scale: softmax scale, positive. max_query_len: upper bound of the requests' query tokens.
        sliding_window: a query sees keys at distance < sliding_window. soft_cap: logits become cap * tanh(logit / cap).
        wide_dtype: of 16-bit tiers. launch: None: default_launch.
    Returns:
        The launch of tensors of these shapes and strides, and these, in the order that it takes.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    T, num_heads, _ = q_latent.shape
    H, block_size, num_splits = kv_cache.shape[1], kv_cache.shape[2], lse.shape[-1]
    check_cache(kv_cache, (k_plan, v_plan))
    num_reqs = check_requests(block_table, seq_lens, query_start_loc)
    k_rank, v_rank = latent_ranks(k_plan, v_plan, launch)
    check_dense("q_latent", q_latent, (T, num_heads, k_rank))
    check_dense("q_bias", q_bias, (T, num_heads))
    check_dense("latent", latent, (T, num_heads, num_splits, v_rank))
    check_dense("lse", lse, (T, num_heads, num_splits))
    if num_heads % H:
        raise ValueError(f"q_latent: expected a multiple of {H} heads, got {num_heads}")
    group = num_heads // H
    launch = launch or default_launch(query_tile(group, max_query_len)[1], k_rank + v_rank, v_plan)
    tile_tokens, columns = launched_tile(group, max_query_len, launch)
    tiles = num_query_tiles(T, num_reqs, max_query_len, tile_tokens) if T > 0 and num_reqs > 0 else 0
    bound = Bound(
        decode_kernel, (tiles * num_splits, H),
        num_reqs, num_splits, block_table.stride(0), kv_cache.stride(0), kv_cache.stride(1), scale, soft_cap or 1.0,
        GROUP=group, BLOCK_SIZE=block_size, WINDOW=sliding_window or 0, SOFT_CAP=bool(soft_cap),
        WIDE=wide_type(wide_dtype), SKIP_FIRST_CHUNKS=skip_first_chunks, ONE_TILE=max_query_len <= tile_tokens,
        K_RANK=k_rank, K_PLAN=k_plan, V_RANK=v_rank, V_PLAN=v_plan,
        TILE_TOKENS=tile_tokens, N=columns, TILE=ROWS_TILE if launch.rows else TILE, ROWS=launch.rows is not None,
        **launch.options(), **pdl_options(q_latent.device),
    )  # fmt: skip
    return bound, (q_latent, q_bias, kv_cache, block_table, seq_lens, query_start_loc, latent, lse)


decode = launcher(bind_decode)
