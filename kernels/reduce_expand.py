# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of attention: merge the splits of every query row by their lse, expand the latent once, add the mean of V.

In: (latent, lse) of decode. Out: the attention output in the model's dtype. Meaning: reference.merge_splits, expand.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_dense, check_floats
from kvsplice_kernels.packing import dot, to_float
from kvsplice_kernels.query_tiles import check_requests, find_tile, num_query_tiles, request_lens

FEW_ROWS = 512  # query rows (tokens x heads) up to which one program takes one row, for the parallelism


@triton.jit
def _merge(latent_ptr, lse_ptr, row, row_ok, num_splits, RANK: tl.constexpr, RANK_PAD: tl.constexpr, M: tl.constexpr,
           SPLITS_AT_ONCE: tl.constexpr):  # fmt: skip
    """Latents [M, RANK_PAD] of the union of splits, and whether a row saw any key [M]. Empty splits are not read."""
    r = tl.arange(0, RANK_PAD)
    m = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    z = tl.zeros([M, RANK_PAD], tl.float32)
    for first in range(0, num_splits, SPLITS_AT_ONCE):
        split = first + tl.arange(0, SPLITS_AT_ONCE)
        partial = row[None, :] * num_splits + split[:, None]
        wanted = row_ok[None, :] & (split < num_splits)[:, None]
        lse = tl.load(lse_ptr + partial, mask=wanted, other=float("-inf"))
        full = lse > float("-inf")
        ptrs = latent_ptr + partial[:, :, None] * RANK + r[None, None, :]
        latent = tl.load(ptrs, mask=full[:, :, None] & (r < RANK)[None, None, :], other=0.0)
        new_m = tl.maximum(m, tl.max(lse, 0))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        alpha = tl.exp(m - safe_m)
        weight = tl.exp(lse - safe_m[None, :])
        weight_sum = weight_sum * alpha + tl.sum(weight, 0)
        z = z * alpha[:, None] + tl.sum(latent * weight[:, :, None], 0)
        m = new_m
    any_seen = weight_sum > 0
    return z / tl.where(any_seen, weight_sum, 1.0)[:, None], any_seen


@triton.jit(
    do_not_specialize=["num_reqs", "num_splits"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "query_start_loc_ptr"],
)
def reduce_expand_kernel(
    latent_ptr,  # [num_tokens, num_heads, num_splits, RANK] fp32
    lse_ptr,  # [num_tokens, num_heads, num_splits] fp32, natural log
    v_decode_ptr,  # [num_kv_heads, HEAD_DIM, RANK] fp32
    v_mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    seq_lens_ptr,  # [num_reqs] int32
    query_start_loc_ptr,  # [num_reqs + 1] int32
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM] bf16, fp16 or fp32
    num_reqs, num_splits, stride_t, stride_h,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    SKIP_FIRST_CHUNKS: tl.constexpr, ONE_TILE: tl.constexpr, TILE_TOKENS: tl.constexpr, M: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Rows: TILE_TOKENS query tokens x HEADS heads of one KV head (all GROUP of them, or one); BLOCK_D outputs each."""
    request, first_query = find_tile(tl.program_id(0), query_start_loc_ptr, num_reqs, TILE_TOKENS, ONE_TILE)
    start, query_len, seq_len = request_lens(request, query_start_loc_ptr, seq_lens_ptr)
    live = first_query < query_len
    if SKIP_FIRST_CHUNKS:
        live = live & (seq_len != query_len)
    if live:
        r = tl.arange(0, M)
        query = first_query + r // HEADS
        row_ok = (r < TILE_TOKENS * HEADS) & (query < query_len)
        token, head = (start + query).to(tl.int64), tl.program_id(1) * HEADS + r % HEADS
        kv_head = tl.program_id(1) * HEADS // GROUP
        row = token * (tl.num_programs(1) * HEADS) + head
        written = row_ok & (query < tl.where(seq_len > 0, query_len, 0))  # decode leaves requests without keys alone
        z, any_seen = _merge(latent_ptr, lse_ptr, row, written, num_splits, RANK, RANK_PAD, M, SPLITS_AT_ONCE)
        d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        rank = tl.arange(0, RANK_PAD)
        d_ok = d < HEAD_DIM
        ptrs = v_decode_ptr + (kv_head * HEAD_DIM + d)[None, :] * RANK + rank[:, None]
        decode = tl.load(ptrs, mask=d_ok[None, :] & (rank < RANK)[:, None], other=0.0)
        if M == 1:
            full = tl.sum(tl.trans(z) * decode, 0)[None, :]
        else:
            full = dot(z, decode, tl.zeros([M, BLOCK_D], tl.float32), "tf32x3")
        full += tl.load(v_mean_ptr + kv_head * HEAD_DIM + d, mask=d_ok, other=0.0)[None, :]
        full = tl.where(any_seen[:, None], full, 0.0)
        out_ptrs = out_ptr + (token * stride_t + head * stride_h)[:, None] + d[None, :]
        tl.store(out_ptrs, to_float(full, out_ptr.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])


def reduce_expand(
    latent: Tensor,
    lse: Tensor,
    v_decode: Tensor,
    v_mean: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    max_query_len: int,
    skip_first_chunks: bool = False,
) -> None:
    """Merge splits and expand to head_dim, writing into ``out``; rows that see no key become 0.

    Rows of no request and, with ``skip_first_chunks``, of requests with seq_len == query_len are not written.

    Args:
        latent: [T, num_heads, num_splits, rank] and lse [T, num_heads, num_splits], fp32, of decode.
        v_decode: [H, head_dim, rank] fp32. v_mean: [H, head_dim] fp32.
        seq_lens: [B] int32. query_start_loc: [B + 1] int32. max_query_len: upper bound of the requests' query tokens.
        out: [>= T, num_heads, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    T, num_heads, num_splits, rank = latent.shape
    H, head_dim, _ = v_decode.shape
    num_reqs = check_requests(None, seq_lens, query_start_loc)
    check_dense("latent", latent, (T, num_heads, num_splits, rank))
    check_dense("lse", lse, (T, num_heads, num_splits))
    check_dense("v_decode", v_decode, (H, head_dim, rank))
    check_dense("v_mean", v_mean, (H, head_dim))
    check_floats("out", out[:T], (T, num_heads, head_dim))
    if T == 0 or num_reqs == 0:
        return
    group = num_heads // H
    heads, tile_tokens, rows, at_once = _rows(T * num_heads, group, max_query_len)
    block_d = min(64, triton.next_power_of_2(head_dim))
    tiles = num_query_tiles(T, num_reqs, max_query_len, tile_tokens)
    reduce_expand_kernel[(tiles, num_heads // heads, triton.cdiv(head_dim, block_d))](
        latent, lse, v_decode, v_mean, seq_lens, query_start_loc, out,
        num_reqs, num_splits, out.stride(0), out.stride(1),
        GROUP=group, HEADS=heads, HEAD_DIM=head_dim, RANK=rank, RANK_PAD=max(16, triton.next_power_of_2(rank)),
        SKIP_FIRST_CHUNKS=skip_first_chunks, ONE_TILE=max_query_len <= tile_tokens, TILE_TOKENS=tile_tokens, M=rows,
        BLOCK_D=block_d, SPLITS_AT_ONCE=at_once, num_warps=4,
    )  # fmt: skip


def _rows(total_rows: int, group: int, max_query_len: int) -> tuple[int, int, int, int]:
    """(heads, query tokens, rows of the dot, splits loaded at once) of a program."""
    if total_rows <= FEW_ROWS:
        return 1, 1, 1, 16
    tokens = min(triton.next_power_of_2(max_query_len), max(1, 32 // group))
    return group, tokens, max(16, triton.next_power_of_2(tokens * group)), 4
