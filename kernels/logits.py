# SPDX-License-Identifier: Apache-2.0
"""Queries and keys of decode: S^T = K q^T of a tile of tokens, on the codes.

In: q_latent of project_query, a tile's pages. Out: logits in steps of the query. Queries are pairs of int8, high and low, about 15
bits of each row's greatest magnitude; a scale multiplies a token's dot with the codes, less sum(q) times their middle.
"""

import triton
import triton.language as tl

from kvsplice_kernels.operands import (
    key_codes,
    key_depth,
    key_first,
    key_index,
    key_parts,
    load_keys,
    load_scales,
    query_index,
)
from kvsplice_kernels.packing import dot, floor_power_of_two, inverse_power_of_two, round_even, scale_of, to_float
from kvsplice_kernels.plan import chunk_width, middle, num_chunks, num_tiers, tier_bits

HIGH = tl.constexpr(63.5)  # q in units of a power of two not above its greatest magnitude: |q| < 2, |high| <= 127
LOW = tl.constexpr(254)
Q_STEP = tl.constexpr(1 / (63.5 * 254))


# ---------------------------------------------------------------- queries
@triton.jit
def load_query(q_ptrs, row_ok, PLAN: tl.constexpr):
    """q_latent as fp32 parts [N, PAD / 16, 16], and the power of two below each row's greatest magnitude [N].

    In this order a thread loads what the dot's operand wants of it, four neighbours in each 16, so that turning the part
    into [PAD, N] moves nothing. It would be moved again for every tile: Triton 3.6 sinks such moves into loops.
    """
    parts = ()
    greatest = tl.zeros(row_ok.shape, tl.float32)
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            for i in tl.static_range(key_parts(PLAN, t)):
                k = tl.arange(0, 16)[None, None, :] + 16 * tl.arange(0, key_depth(PLAN, t, c) // 16)[None, :, None]
                inside = row_ok[:, None, None] & (k < chunk_width(PLAN, t, c))
                q = tl.load(q_ptrs[:, None, None] + (key_first(PLAN, t, c, i) + k), mask=inside, other=0.0)
                greatest = tl.maximum(greatest, tl.max(tl.max(tl.abs(q), 2), 1))
                parts = parts + (q,)
    return parts, floor_power_of_two(greatest)


@triton.jit
def cast_query(parts, unit, PLAN: tl.constexpr, WIDE: tl.constexpr):
    """Operands in steps of unit * Q_STEP, (high, low) int8 of every part, or one float of ``unit`` at 16 bits; and for
    each tier what they add to a dot with codes of zeros, in steps [N]."""
    inverse = inverse_power_of_two(unit)[:, None, None]
    cast, sums = (), ()
    for t in tl.static_range(num_tiers(PLAN)):
        total = tl.zeros(unit.shape, tl.float32)
        for c in tl.static_range(num_chunks(PLAN, t)):
            for i in tl.static_range(key_parts(PLAN, t)):
                q = parts[key_index(PLAN, t, c) + i] * inverse
                if tier_bits(PLAN, t) == 16:
                    cast = cast + (_operand(to_float(q, WIDE)),)
                else:
                    high = round_even(q * HIGH)
                    low = round_even((q * HIGH - high) * LOW)
                    total += tl.sum(tl.sum(high * LOW + low, 2), 1)
                    cast = cast + (_operand(high.to(tl.int8)), _operand(low.to(tl.int8)))
        sums = sums + (total * middle(PLAN, t),)
    return cast, sums


@triton.jit
def _operand(q):
    """[N, PAD / 16, 16] -> [PAD, N]."""
    return tl.reshape(tl.permute(q, (1, 2, 0)), [q.shape[1] * 16, q.shape[0]])


# ---------------------------------------------------------------- keys
@triton.jit
def _tier_logits(x, q, q_sum, page, row, valid, code, PLAN: tl.constexpr, t: tl.constexpr, WIDE: tl.constexpr):
    """x [TILE, N] plus one tier's share of q.k^, in steps of the query."""
    if tier_bits(PLAN, t) == 16:
        u = tl.zeros(x.shape, tl.float32)
        for c in tl.static_range(num_chunks(PLAN, t)):
            k = load_keys(page, row, valid, PLAN, t, c, WIDE)
            u = dot(k, q[query_index(PLAN, t, c)], u, "ieee")
        return x + u * (1.0 / Q_STEP)
    else:
        high, low = tl.zeros(x.shape, tl.int32), tl.zeros(x.shape, tl.int32)
        for c in tl.static_range(num_chunks(PLAN, t)):
            k = load_keys(page, row, valid, PLAN, t, c, WIDE)
            for i in tl.static_range(key_parts(PLAN, t)):
                codes = key_codes(k, i, PLAN, t)
                high = tl.dot(codes, q[query_index(PLAN, t, c) + 2 * i], high, out_dtype=tl.int32)
                low = tl.dot(codes, q[query_index(PLAN, t, c) + 2 * i + 1], low, out_dtype=tl.int32)
        dots = (high * LOW + low).to(tl.float32)
        if middle(PLAN, t) > 0:
            dots -= q_sum[None, :]
        return x + dots * scale_of(code)[:, None]  # finite whatever the bytes, so that -inf stays


@triton.jit
def logits(
    q, q_sums, page, row, position, valid, q_position,
    ONE_QUERY: tl.constexpr, WINDOW: tl.constexpr, PLAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """q.k^ of a tile [TILE, N] in steps of the query, -inf where a token is not seen."""
    codes = load_scales(page, row, PLAN)
    if ONE_QUERY:
        bias = tl.where(valid, 0.0, float("-inf"))
        x = tl.broadcast_to(bias[:, None], [position.shape[0], q_position.shape[0]])
    else:
        distance = q_position[None, :] - position[:, None]
        seen = (distance >= 0) & valid[:, None]
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        x = tl.where(seen, 0.0, float("-inf"))
    for t in tl.static_range(num_tiers(PLAN)):
        x = _tier_logits(x, q, q_sums[t], page, row, valid, codes[t], PLAN, t, WIDE)
    return x
