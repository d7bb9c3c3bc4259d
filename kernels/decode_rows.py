# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of attention for many query rows: what decode does, with queries as the rows of both dots.

In and out: decode's. Speculative tokens and the ends of cached prompts give one KV head 32 rows and more, of which decode's
warps hold 8 to 16 each, and every warp unpacks all codes anew. Here a program of four or eight warps unpacks them once, into
fp16 operands in shared memory, and Hopper's tensor cores take 64 rows at a time (wgmma); other GPUs use mma. Chosen by
``Launch.rows``.

An unpacked latent is exact under scales from 2**-15 on: a code of 8 bits times a scale of 4 has 11, fp16's significand, and in
units of UNIT the greatest scale's products are below 65504. Smaller scales, of rows whose greatest magnitude is 4e-3 or less (8 bits),
are rounded to multiples of 2**-19, of which decode knows nothing. Queries are fp16 in units of a power of two, p is
fp16. The rest follows FlashAttention-2 (Dao 2023, algorithm 1), with the exponent taken in base 2.
"""

import triton
import triton.language as tl

from kvsplice_kernels.packing import (
    INTERPRETED,
    dot,
    floor_power_of_two,
    inverse_power_of_two,
    load_block,
    load_codes,
    operand,
    page_of,
    scale_of,
    tanh,
    to_float,
)
from kvsplice_kernels.plan import (
    chunk_col,
    chunk_pad,
    chunk_width,
    middle,
    num_chunks,
    num_parts,
    num_tiers,
    scale_offset,
    tier_bits,
    tier_row,
    tier_start,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNIT = tl.constexpr(32.0)  # of unpacked latents: 127 times the greatest scale, 1.875 * 2**13, is below 65504 of them
# p reaches 2**HEADROOM, so that fp16 holds what is 2**-34 of the greatest.
HEADROOM = tl.constexpr(10.0)


# ---------------------------------------------------------------- operands
@triton.constexpr_function
def _chunk_index(plan, t, c):
    """Index of a chunk among all of a side."""
    return sum(num_chunks(plan, u) for u in range(t)) + c


@triton.jit
def _chunk_dims(PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr):
    """(latent dimensions of an unpacked chunk's columns, a byte's own side by side; whether a column is none of padding)."""
    PARTS: tl.constexpr = num_parts(PLAN, t)
    column = tl.arange(0, chunk_pad(PLAN, t, c) * PARTS)
    byte, part = column // PARTS, column % PARTS
    return tier_start(PLAN, t) + part * tier_row(PLAN, t) + chunk_col(PLAN, t, c) + byte, byte < chunk_width(PLAN, t, c)


@triton.jit
def _load_query(q_ptrs, row_ok, PLAN: tl.constexpr, WIDE: tl.constexpr):
    """Operands [M, columns] of every chunk, and the power of two [M] that they are in units of."""
    parts = ()
    greatest = tl.zeros(row_ok.shape, tl.float32)
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            dims, inside = _chunk_dims(PLAN, t, c)
            q = tl.load(q_ptrs[:, None] + dims[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
            greatest = tl.maximum(greatest, tl.max(tl.abs(q), 1))
            parts = parts + (q,)
    unit = floor_power_of_two(greatest)
    inverse = inverse_power_of_two(unit)[:, None]
    cast = ()
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            q = parts[_chunk_index(PLAN, t, c)] * inverse
            if tier_bits(PLAN, t) == 16:  # its keys are not in units
                cast = cast + (to_float(q * (1.0 / UNIT), WIDE),)
            else:
                cast = cast + (q.to(tl.float16),)
    return cast, unit


@triton.jit
def _load_scales(page, place, PLAN: tl.constexpr):
    """Scale bytes of every tier, a tile ahead of their use."""
    codes = ()
    for t in tl.static_range(num_tiers(PLAN)):
        if tier_bits(PLAN, t) == 16:
            codes = codes + (0,)
        else:
            code = tl.load(page + (scale_offset(PLAN, t) + place))
            codes = codes + (code,)
    return codes


@triton.jit
def _code_pair(raw, i: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr):
    """Parts i and i + 1 of bytes as exact fp16 codes, in the two halves of one register for each byte."""
    if INTERPRETED:
        return operand(raw, i, PLAN, t), operand(raw, i + 1, PLAN, t)
    else:
        pair = tl.inline_asm_elementwise(
            _pair_asm(i, tier_bits(PLAN, t)), "=&r,=&r,=&r,=&r,r", [raw], dtype=tl.int32, is_pure=True, pack=4
        )
        return pair.to(tl.int16).to(tl.float16, bitcast=True), (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _pair_asm(i, nbits):
    """PTX of _code_pair for four bytes. A code in bits b .. of an fp16 whose exponent makes those count from 1 is 2**(10 - b)
    and the code; lop3 0xea is (a & b) | c."""
    shifts = i * nbits, (i + 1) * nbits
    mask, magic, bias = 0, 0, 0
    for half, shift in enumerate(shifts):
        bits = (25 - shift) << 10  # of 2**(10 - shift)
        mask |= ((1 << nbits) - 1) << (shift + 16 * half)
        magic |= bits << (16 * half)
        bias |= (bits | 0x8000) << (16 * half)
    lines = [".reg .b32 b;", f"mov.b32 b, {bias:#x};"]
    for byte in range(4):
        lines += [
            f"prmt.b32 ${byte}, $4, 0, {0x4040 + 0x101 * byte:#x};",
            f"lop3.b32 ${byte}, ${byte}, {mask:#x}, {magic:#x}, 0xea;",
            f"add.f16x2 ${byte}, ${byte}, b;",
        ]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _latents(page, place, valid, scale_code, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr, WIDE: tl.constexpr):
    """A chunk of a tile unpacked, [TILE, columns]: fp16 in units of UNIT, or the model's floats of a 16-bit tier."""
    raw = load_codes(page, place, valid, PLAN, t, c, WIDE)
    if tier_bits(PLAN, t) == 16:
        return raw
    else:
        scale = (scale_of(scale_code.to(tl.int32)) * (1.0 / UNIT)).to(tl.float16)
        if tier_bits(PLAN, t) == 8:
            return operand(raw, 0, PLAN, t) * scale[:, None]
        else:
            first, second = _code_pair(raw, 0, PLAN, t)
            if tier_bits(PLAN, t) == 4:
                codes = tl.join(first, second)
            else:
                third, fourth = _code_pair(raw, 2, PLAN, t)
                codes = tl.join(tl.join(first, third), tl.join(second, fourth))
            codes = tl.reshape(codes, [raw.shape[0], raw.shape[1] * num_parts(PLAN, t)])
            offset = scale * (-middle(PLAN, t))
            return tl.fma(
                codes, tl.broadcast_to(scale[:, None], codes.shape), tl.broadcast_to(offset[:, None], codes.shape)
            )


# ---------------------------------------------------------------- one program
@triton.jit
def _init_values(PLAN: tl.constexpr, M: tl.constexpr):
    acc = ()
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            acc = acc + (tl.zeros([M, chunk_pad(PLAN, t, c) * num_parts(PLAN, t)], tl.float32),)
    return acc


@triton.jit
def _logits(q, page, place, valid, codes, M: tl.constexpr, PLAN: tl.constexpr, WIDE: tl.constexpr):
    x = tl.zeros([M, place.shape[0]], tl.float32)
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            k = _latents(page, place, valid, codes[t], PLAN, t, c, WIDE)
            x = dot(q[_chunk_index(PLAN, t, c)], tl.trans(k), x, "ieee")
    return x


@triton.jit
def _add_values(acc, alpha, p, page, place, valid, codes, PLAN: tl.constexpr, WIDE: tl.constexpr):
    new = ()
    for t in tl.static_range(num_tiers(PLAN)):
        weights = to_float(p, WIDE if tier_bits(PLAN, t) == 16 else tl.float16)
        for c in tl.static_range(num_chunks(PLAN, t)):
            v = _latents(page, place, valid, codes[t], PLAN, t, c, WIDE)
            new = new + (dot(weights, v, acc[_chunk_index(PLAN, t, c)] * alpha[:, None], "ieee"),)
    return new


@triton.jit
def _store_latent(latent_ptrs, row_ok, acc, inverse_sum, PLAN: tl.constexpr):
    for t in tl.static_range(num_tiers(PLAN)):
        factor = inverse_sum * (1.0 if tier_bits(PLAN, t) == 16 else UNIT)
        for c in tl.static_range(num_chunks(PLAN, t)):
            dims, inside = _chunk_dims(PLAN, t, c)
            z = acc[_chunk_index(PLAN, t, c)] * factor[:, None]
            tl.store(latent_ptrs[:, None] + dims[None, :], z, mask=row_ok[:, None] & inside[None, :])


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
    q, q_unit = _load_query(q_ptrs, row_ok, K_PLAN, WIDE)
    step = q_unit * (UNIT * scale)  # of a logit
    factor = step * LOG2E
    if SOFT_CAP:
        factor = tl.full([M], LOG2E, tl.float32)
    acc = _init_values(V_PLAN, M)
    m = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    token = tl.arange(0, TILE)
    last_seen = tl.minimum(q_position, end_token - 1)
    # Block ids come two tiles ahead and scales one: only the codes' loads are made asynchronous by the compiler.
    page = page_of(cache_ptr, load_block(table_ptr, tile, first_token, end_token, TILE, BLOCK_SIZE), stride_block)
    place = (tile * TILE + token) % BLOCK_SIZE
    k_codes, v_codes = _load_scales(page, place, K_PLAN), _load_scales(page, place, V_PLAN)
    block = load_block(table_ptr, tile + 1, first_token, end_token, TILE, BLOCK_SIZE)
    for i in range(tile, last_tile):
        position = i * TILE + token
        valid = (position >= first_token) & (position < end_token)
        next_page = page_of(cache_ptr, block, stride_block)
        next_place = (position + TILE) % BLOCK_SIZE
        next_k, next_v = _load_scales(next_page, next_place, K_PLAN), _load_scales(next_page, next_place, V_PLAN)
        block = load_block(table_ptr, i + 2, first_token, end_token, TILE, BLOCK_SIZE)
        x = _logits(q, page, place, valid, k_codes, M, K_PLAN, WIDE)
        if SOFT_CAP:
            x = _capped(x, step, bias * scale, soft_cap)
        seen = position[None, :] <= last_seen[:, None]
        if WINDOW > 0:
            seen = seen & (q_position[:, None] - position[None, :] < WINDOW)
        x = tl.where(seen, x, float("-inf"))
        new_m = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m) * factor - HEADROOM
        alpha = tl.exp2(m * factor - HEADROOM - shift)
        p = tl.exp2(x * factor[:, None] - shift[:, None])
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = _add_values(acc, alpha, p, page, place, valid, v_codes, V_PLAN, WIDE)
        m, page, place, k_codes, v_codes = new_m, next_page, next_place, next_k, next_v

    any_seen = row_sum > 0
    safe_sum = tl.where(any_seen, row_sum, 1.0)
    lse = (m * factor - HEADROOM) * LN2 + tl.log(safe_sum)
    if not SOFT_CAP:
        lse += bias * scale
    tl.store(lse_ptrs, tl.where(any_seen, lse, float("-inf")), mask=row_ok)
    _store_latent(latent_ptrs, row_ok, acc, tl.where(any_seen, 1.0 / safe_sum, 0.0), V_PLAN)
