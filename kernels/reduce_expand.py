# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of attention: merge the splits of every query row by their lse, expand the latent once, add the mean of V.

In: (latent, lse) of decode, V's basis as encode.Prepared holds it. Out: the attention output in the model's dtype. Meaning:
reference.merge_splits, expand. The basis is loaded while decode still runs, where programmatic dependent launch is.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_dense, check_floats, next_power_of_2
from kvsplice_kernels.dispatch import Binding, Bound, launcher
from kvsplice_kernels.latents import add_product
from kvsplice_kernels.launch import takes_64_rows
from kvsplice_kernels.packing import to_float
from kvsplice_kernels.pdl import pdl_options, wait
from kvsplice_kernels.query_tiles import check_requests, find_tile, num_query_tiles, request_lens

FEW_ROWS = 256  # query rows (tokens x heads) up to which one program takes one row, for the parallelism
SOME_ROWS, MANY_ROWS = 1000, 4096  # of several tokens a request, from which programs become larger


@triton.jit
def _weights(lse_ptr, row, row_ok, num_splits, SPLITS_PAD: tl.constexpr):
    """(greatest lse [M], inverse of the sum of the splits' weights [M], 0 where a row saw no key, splits up to the last
    that is not empty)."""
    split = tl.arange(0, SPLITS_PAD)
    mask = row_ok[None, :] & (split < num_splits)[:, None]
    lse = tl.load(lse_ptr + row[None, :] * num_splits + split[:, None], mask=mask, other=float("-inf"))
    m = tl.max(lse, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp(lse - m[None, :]), 0)
    used = tl.max(tl.max(tl.where(lse > float("-inf"), (split + 1)[:, None], 0), 0), 0)
    return m, tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0), used


@triton.jit
def _load_partials(latent_ptr, lse_ptr, partial, ok, rank, rank_ok, RANK: tl.constexpr):
    """(latent [n, rank], lse [n], -inf where not ok) of partials [n], row * num_splits + split."""
    latent = tl.load(
        latent_ptr + partial[:, None] * RANK + rank[None, :], mask=ok[:, None] & rank_ok[None, :], other=0.0
    )
    return latent, tl.load(lse_ptr + partial, mask=ok, other=float("-inf"))


@triton.jit
def _weighted(latent, lse, m):
    """latent * e^(lse - m); what empty splits hold, NaN perhaps, is dropped."""
    return tl.where((lse > float("-inf"))[:, None], latent, 0.0) * tl.exp(lse - m)[:, None]


@triton.jit
def _merge_one(
    latent_ptr, lse_ptr, row, row_ok, num_splits, rank, rank_ok,
    SPLITS_PAD: tl.constexpr, AT_ONCE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Latent [1, rank] of the union of one row's splits, and whether it saw any key [1]."""
    split = tl.arange(0, AT_ONCE)
    partial = tl.sum(row, 0) * num_splits + split
    row_used = tl.where(tl.max(row_ok.to(tl.int32), 0) > 0, num_splits, 0)
    # The first loads do not wait for the lse of all splits, which says how many more there are.
    latent, lse = _load_partials(latent_ptr, lse_ptr, partial, split < row_used, rank, rank_ok, RANK)
    m, inverse, used = _weights(lse_ptr, row, row_ok, num_splits, SPLITS_PAD)
    parts = _weighted(latent, lse, m)
    for first in range(AT_ONCE, used, AT_ONCE):
        latent, lse = _load_partials(latent_ptr, lse_ptr, partial + first, first + split < used, rank, rank_ok, RANK)
        parts += _weighted(latent, lse, m)
    return tl.sum(parts, 0)[None, :] * inverse[:, None], inverse > 0


@triton.jit
def _merge_many(
    latent_ptr, lse_ptr, row, row_ok, num_splits, rank, rank_ok,
    SPLITS_PAD: tl.constexpr, AT_ONCE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The same of M rows: ([M, rank], [M])."""
    partial, row_splits = row * num_splits, tl.where(row_ok, num_splits, 0)
    loaded = ()
    for i in tl.static_range(AT_ONCE):
        loaded = loaded + (_load_partials(latent_ptr, lse_ptr, partial + i, i < row_splits, rank, rank_ok, RANK),)
    m, inverse, used = _weights(lse_ptr, row, row_ok, num_splits, SPLITS_PAD)
    z = tl.zeros([row.shape[0], rank.shape[0]], tl.float32)
    for i in tl.static_range(AT_ONCE):
        z += _weighted(loaded[i][0], loaded[i][1], m)
    for first in range(AT_ONCE, used, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            ok = first + i < tl.minimum(row_splits, used)
            latent, lse = _load_partials(latent_ptr, lse_ptr, partial + first + i, ok, rank, rank_ok, RANK)
            z += _weighted(latent, lse, m)
    return z * inverse[:, None], inverse > 0


@triton.jit
def _expand(z, high, low):
    """z [M, rank] times planes [rank, BLOCK_D] in fp32."""
    if z.shape[0] == 1:
        return tl.sum(tl.trans(z) * (high.to(tl.float32) + low.to(tl.float32)), 0)[None, :]
    else:
        return add_product(tl.zeros([z.shape[0], high.shape[1]], tl.float32), z, high, low)


@triton.jit(
    do_not_specialize=["num_reqs", "num_splits"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "query_start_loc_ptr"],
)
def reduce_expand_kernel(
    latent_ptr,  # [num_tokens, num_heads, num_splits, RANK] fp32
    lse_ptr,  # [num_tokens, num_heads, num_splits] fp32, natural log
    planes_ptr,  # [num_kv_heads, 2, HEAD_DIM, RANK] bf16
    v_mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    seq_lens_ptr,  # [num_reqs] int32
    query_start_loc_ptr,  # [num_reqs + 1] int32
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM] bf16, fp16 or fp32
    num_reqs, num_splits, stride_t, stride_h,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    SKIP_FIRST_CHUNKS: tl.constexpr, ONE_TILE: tl.constexpr, ONE_QUERY: tl.constexpr, TILE_TOKENS: tl.constexpr,
    M: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS_PAD: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows: TILE_TOKENS query tokens x HEADS heads of one KV head (all GROUP of them, or one); BLOCK_D outputs each.

    The tokens are of one request, or, with ONE_QUERY, of as many requests, none of which has more than one.
    """
    kv_head = tl.program_id(1) * HEADS // GROUP
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    rank = tl.arange(0, RANK_PAD)
    rank_ok = rank < RANK
    ptrs = planes_ptr + kv_head * (2 * HEAD_DIM * RANK) + d[None, :] * RANK + rank[:, None]
    mask = d_ok[None, :] & rank_ok[:, None]
    high = tl.load(ptrs, mask=mask, other=0.0)
    low = tl.load(ptrs + HEAD_DIM * RANK, mask=mask, other=0.0)
    mean = tl.load(v_mean_ptr + kv_head * HEAD_DIM + d, mask=d_ok, other=0.0)
    r = tl.arange(0, M)
    if ONE_QUERY:
        request = tl.program_id(0) * TILE_TOKENS + r // HEADS
        inside = (r < TILE_TOKENS * HEADS) & (request < num_reqs)
        start = tl.load(query_start_loc_ptr + request, mask=inside, other=0)
        query_len = tl.load(query_start_loc_ptr + request + 1, mask=inside, other=0) - start
        seq_len = tl.load(seq_lens_ptr + request, mask=inside, other=0)
        query = r * 0
    else:
        request, first_query = find_tile(tl.program_id(0), query_start_loc_ptr, num_reqs, TILE_TOKENS, ONE_TILE)
        start, query_len, seq_len = request_lens(request, query_start_loc_ptr, seq_lens_ptr)
        inside = r < TILE_TOKENS * HEADS
        query = first_query + r // HEADS
    wait(PDL)  # the lengths above came before decode, whose programs start this kernel after their own wait
    if SKIP_FIRST_CHUNKS:
        query_len = tl.where(seq_len == query_len, 0, query_len)
    row_ok = inside & (query < query_len)
    if tl.max(row_ok.to(tl.int32), 0) > 0:
        token, head = (start + query).to(tl.int64), tl.program_id(1) * HEADS + r % HEADS
        row = token * (tl.num_programs(1) * HEADS) + head
        written = row_ok & (query < tl.where(seq_len > 0, query_len, 0))  # decode leaves requests without keys alone
        if M == 1:
            z, any_seen = _merge_one(
                latent_ptr, lse_ptr, row, written, num_splits, rank, rank_ok, SPLITS_PAD, AT_ONCE, RANK
            )
        else:
            z, any_seen = _merge_many(
                latent_ptr, lse_ptr, row, written, num_splits, rank, rank_ok, SPLITS_PAD, AT_ONCE, RANK
            )
        full = tl.where(any_seen[:, None], _expand(z, high, low) + mean[None, :], 0.0)
        out_ptrs = out_ptr + (token * stride_t + head * stride_h)[:, None] + d[None, :]
        tl.store(out_ptrs, to_float(full, out_ptr.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])


def bind_reduce(
    latent: Tensor,
    lse: Tensor,
    v_decode: Tensor,
    v_mean: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    max_query_len: int,
    skip_first_chunks: bool = False,
) -> Binding:
    """Merge splits and expand to head_dim, writing into ``out``; rows that see no key become 0.

    Rows of no request and, with ``skip_first_chunks``, of requests with seq_len == query_len are not written.

    Args:
        latent: [T, num_heads, num_splits, rank] and lse [T, num_heads, num_splits], fp32, of decode.
        v_decode: [H, 2, head_dim, rank] bf16, v_mean: [H, head_dim] fp32, of encode.Prepared.
        seq_lens: [B] int32. query_start_loc: [B + 1] int32. max_query_len: upper bound of the requests' query tokens.
        out: [>= T, num_heads, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Returns:
        The launch of tensors of these shapes and strides, and these, in the order that it takes.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    T, num_heads, num_splits, rank = latent.shape
    H, _, head_dim, _ = v_decode.shape
    num_reqs = check_requests(None, seq_lens, query_start_loc)
    check_dense("latent", latent, (T, num_heads, num_splits, rank))
    check_dense("lse", lse, (T, num_heads, num_splits))
    check_dense("v_decode", v_decode, (H, 2, head_dim, rank), torch.bfloat16)
    check_dense("v_mean", v_mean, (H, head_dim))
    check_floats("out", out[:T], (T, num_heads, head_dim))
    group, rank_pad = num_heads // H, max(16, next_power_of_2(rank))
    tall = takes_64_rows(latent.device)
    cut = reduce_tiles(T * num_heads, group, max_query_len, head_dim, rank_pad, num_splits, tall)
    if T == 0 or num_reqs == 0:
        tiles = 0
    elif max_query_len == 1:
        tiles = -(-num_reqs // cut.tile_tokens)
    else:
        tiles = num_query_tiles(T, num_reqs, max_query_len, cut.tile_tokens)
    bound = Bound(
        reduce_expand_kernel, (tiles, num_heads // cut.heads, -(-head_dim // cut.block_d)),
        num_reqs, num_splits, out.stride(0), out.stride(1),
        GROUP=group, HEADS=cut.heads, HEAD_DIM=head_dim, RANK=rank, RANK_PAD=rank_pad,
        SKIP_FIRST_CHUNKS=skip_first_chunks, ONE_TILE=max_query_len <= cut.tile_tokens,
        ONE_QUERY=max_query_len == 1, TILE_TOKENS=cut.tile_tokens, M=cut.rows, BLOCK_D=cut.block_d, SPLITS_PAD=next_power_of_2(num_splits), AT_ONCE=cut.at_once,
        num_warps=cut.num_warps, num_stages=1, **pdl_options(latent.device),
    )  # fmt: skip
    return bound, (latent, lse, v_decode, v_mean, seq_lens, query_start_loc, out)


reduce_expand = launcher(bind_reduce)


class ReduceTiles(NamedTuple):
    """How the reduction of a step is cut into programs."""

    heads: int  # query heads of a program, of one KV head
    tile_tokens: int  # query tokens of a program
    rows: int  # of its dot; 1: no dot
    block_d: int  # outputs of a program
    at_once: int  # splits whose loads it has in flight
    num_warps: int


@lru_cache(maxsize=4096)
def reduce_tiles(
    total_rows: int, group: int, max_query_len: int, head_dim: int, rank_pad: int, num_splits: int, tall: bool
) -> ReduceTiles:
    """The fastest of a sweep at 28/4 heads x 128 and 1 x 32k, 8 x 8k, 16 x 32k, 64 x 4k and 256 x 2k tokens, and, of several tokens a
    request, at 64 x 4k, 16 x 32k, 4 x 8k and 1 x 32k.

    One row a program for few rows, with as many splits in flight as registers hold; else the rows of one dot, more of
    them where there is nothing to merge. ``tall``: 64 of them do not spill, as they do but with Hopper's tensor cores.
    """
    splits, widest = next_power_of_2(num_splits), max(16, next_power_of_2(head_dim))
    narrow, wide = (min(widest, max(16, d * 128 // rank_pad)) for d in (64, 128))
    if total_rows <= FEW_ROWS:
        few = total_rows <= FEW_ROWS // 4  # less than one program of 8 warps for each multiprocessor
        at_once = max(1, min(splits, (64 if few else 32) * 128 // rank_pad))
        return ReduceTiles(1, 1, 1, narrow if few else wide, at_once, 8 if few else 4)
    merges, several = num_splits > 1, max_query_len > 1
    tall = tall and several and total_rows >= MANY_ROWS and rank_pad <= 128
    tokens = max(1, (16 if merges else 64 if tall else 32) // group)
    if several:  # else of different requests
        tokens = min(next_power_of_2(max_query_len), tokens)
    rows = max(16, next_power_of_2(tokens * group))
    at_once = max(1, min(splits, 8 * 128 // rank_pad))
    small = merges and (total_rows < SOME_ROWS or not several)
    return ReduceTiles(group, tokens, rows, narrow if small else wide, at_once, 8 if small or rank_pad > 128 else 4)
