# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of attention for many query rows: what decode does, with queries as the rows of both dots.

In and out: decode's. Speculative tokens and the ends of cached prompts give one KV head 32 rows and more, of which decode's
warps hold 8 to 16 each, and every warp unpacks all codes anew. Here a program of four warps for every 64 rows unpacks them once,
into one fp16 operand for K and one for V in shared memory (row_operands), and Hopper's tensor cores take 64 rows at a time
(wgmma); other GPUs use mma. Chosen by ``Launch.rows``. The rest follows FlashAttention-2 (Dao 2023, algorithm 1), with the
exponent taken in base 2.
"""

import triton
import triton.language as tl

from kvsplice_kernels.packing import dot, load_block, load_scale_bytes, page_of, tanh, to_float
from kvsplice_kernels.row_operands import (
    UNIT,
    code_tile,
    fits,
    load_query_rows,
    num_columns,
    through_memory,
    wide_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# p reaches 2**HEADROOM, so that fp16 holds what is 2**-34 of the greatest.
HEADROOM = tl.constexpr(10.0)


# ---------------------------------------------------------------- one program
@triton.jit
def _logits(q, q_wide, page, place, valid, codes, M: tl.constexpr, PLAN: tl.constexpr, WIDE: tl.constexpr):
    x = tl.zeros([M, place.shape[0]], tl.float32)
    if num_columns(PLAN, False) > 0:
        x = dot(q, tl.trans(code_tile(page, place, codes, PLAN)), x, "ieee")
    if num_columns(PLAN, True) > 0:
        x = dot(q_wide, tl.trans(wide_tile(page, place, valid, PLAN, WIDE)), x, "ieee")
    return x


@triton.jit
def _init_values(PLAN: tl.constexpr, WIDE_ONES: tl.constexpr, M: tl.constexpr):
    if num_columns(PLAN, WIDE_ONES) > 0:
        return tl.zeros([M, num_columns(PLAN, WIDE_ONES)], tl.float32)
    else:
        return tl.zeros([1], tl.float32)  # a loop's


@triton.jit
def _add_values(acc, acc_wide, alpha, p, page, place, valid, codes, PLAN: tl.constexpr, WIDE: tl.constexpr):
    if num_columns(PLAN, False) > 0:
        acc = dot(p.to(tl.float16), code_tile(page, place, codes, PLAN), acc * alpha[:, None], "ieee")
    if num_columns(PLAN, True) > 0:
        acc_wide = dot(to_float(p, WIDE), wide_tile(page, place, valid, PLAN, WIDE), acc_wide * alpha[:, None], "ieee")
    return acc, acc_wide


@triton.jit
def _store_columns(latent_ptrs, row_ok, acc, factor, FIRST: tl.constexpr, COUNT: tl.constexpr):
    if COUNT > 0:
        ptrs = latent_ptrs[:, None] + (FIRST + tl.arange(0, COUNT))[None, :]
        tl.store(ptrs, acc * factor[:, None], mask=row_ok[:, None])


@triton.jit
def _capped(x, factor, bias, soft_cap):
    """soft_cap * tanh(logit / soft_cap), in natural units."""
    return tanh((x * factor[:, None] + bias[:, None]) / soft_cap) * soft_cap


@triton.jit
def attend_rows(
    q_ptrs, row_ok, q_position, bias, cache_ptr, table_ptr, latent_ptrs, lse_ptrs,
    stride_block, scale, soft_cap, first_token, end_token, tile, last_tile,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, WIDE: tl.constexpr,
    K_PLAN: tl.constexpr, V_PLAN: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attend the rows to the tokens [first_token, end_token) of the tiles [tile, last_tile) and store (latent, lse)."""
    q, q_wide, q_unit = load_query_rows(q_ptrs, row_ok, K_PLAN, WIDE)
    if fits(K_PLAN, V_PLAN):  # into rows that are written when all is read
        if num_columns(K_PLAN, False) > 0:
            q = through_memory(q, latent_ptrs, row_ok)
        if num_columns(K_PLAN, True) > 0:
            q_wide = through_memory(q_wide, latent_ptrs + num_columns(K_PLAN, False) // 2, row_ok)
    step = q_unit * (UNIT * scale)  # of a logit
    factor = step * LOG2E
    if SOFT_CAP:
        factor = tl.full([M], LOG2E, tl.float32)
    acc, acc_wide = _init_values(V_PLAN, False, M), _init_values(V_PLAN, True, M)
    m = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    token = tl.arange(0, TILE)
    last_seen = tl.minimum(q_position, end_token - 1)
    # Tiles that every row sees whole need no mask: those before all_seen and, of a window, from windowed on.
    all_seen = (tl.min(last_seen, 0) + 1) // TILE
    windowed = 0
    if WINDOW > 0:
        windowed = tl.cdiv(tl.max(q_position, 0) - WINDOW + 1, TILE)
    # Block ids come two tiles ahead and scales one: only the codes' loads are made asynchronous by the compiler.
    page = page_of(cache_ptr, load_block(table_ptr, tile, first_token, end_token, TILE, BLOCK_SIZE), stride_block)
    place = (tile * TILE + token) % BLOCK_SIZE
    k_codes, v_codes = load_scale_bytes(page, place, K_PLAN), load_scale_bytes(page, place, V_PLAN)
    block = load_block(table_ptr, tile + 1, first_token, end_token, TILE, BLOCK_SIZE)
    for i in range(tile, last_tile):
        position = i * TILE + token
        valid = (position >= first_token) & (position < end_token)
        next_page = page_of(cache_ptr, block, stride_block)
        next_place = (position + TILE) % BLOCK_SIZE
        next_k, next_v = (
            load_scale_bytes(next_page, next_place, K_PLAN),
            load_scale_bytes(next_page, next_place, V_PLAN),
        )
        block = load_block(table_ptr, i + 2, first_token, end_token, TILE, BLOCK_SIZE)
        x = _logits(q, q_wide, page, place, valid, k_codes, M, K_PLAN, WIDE)
        if SOFT_CAP:
            x = _capped(x, step, bias * scale, soft_cap)
        if (i >= all_seen) | (i < windowed):
            seen = position[None, :] <= last_seen[:, None]
            if WINDOW > 0:
                seen = seen & (q_position[:, None] - position[None, :] < WINDOW)
            x = tl.where(seen, x, float("-inf"))
        new_m = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m) * factor - HEADROOM
        alpha = tl.exp2(m * factor - HEADROOM - shift)
        p = tl.exp2(x * factor[:, None] - shift[:, None])
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc, acc_wide = _add_values(acc, acc_wide, alpha, p, page, place, valid, v_codes, V_PLAN, WIDE)
        m, page, place, k_codes, v_codes = new_m, next_page, next_place, next_k, next_v

    any_seen = row_sum > 0
    safe_sum = tl.where(any_seen, row_sum, 1.0)
    lse = (m * factor - HEADROOM) * LN2 + tl.log(safe_sum)
    if not SOFT_CAP:
        lse += bias * scale
    tl.store(lse_ptrs, tl.where(any_seen, lse, float("-inf")), mask=row_ok)
    inverse_sum = tl.where(any_seen, 1.0 / safe_sum, 0.0)
    CODES: tl.constexpr = num_columns(V_PLAN, False)
    _store_columns(latent_ptrs, row_ok, acc, inverse_sum * UNIT, 0, CODES)
    _store_columns(latent_ptrs, row_ok, acc_wide, inverse_sum, CODES, num_columns(V_PLAN, True))
