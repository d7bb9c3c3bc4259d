# SPDX-License-Identifier: Apache-2.0
"""Values of decode: z^T = V^T p^T of a tile of tokens, on the codes, and the split's latent in the end.

In: probabilities, a tile's pages. Out: accumulators, then latents in memory. Scales multiply p before the dot, in units of the greatest
scale so far, so that fp16 holds the product; their sum, once for all dimensions of a tier, takes the codes' middle off.
"""

import triton
import triton.language as tl

from kvsplice_kernels.operands import (
    folded,
    halves,
    load_value_pairs,
    load_values,
    value_codes,
    value_factor,
    value_first,
    value_index,
    value_parts,
    value_rows,
    word_width,
)
from kvsplice_kernels.packing import dot, floor_power_of_two, scale_of, to_float
from kvsplice_kernels.plan import chunk_paired, middle, num_chunks, num_tiers, tier_bits

# Accumulators are scaled anew only when a logit exceeds the maximum so far by MAX_EXPONENT in base 2; until then p grows to
# 2**MAX_EXPONENT. (FlashAttention-4 skips rescaling so, https://github.com/Dao-AILab/flash-attention.)
MAX_EXPONENT = tl.constexpr(5)
# p * scale fills fp16 up to 2**15: tokens whose scale is 2**-24 of the greatest one still count.
HEADROOM = tl.constexpr(512.0)


# ---------------------------------------------------------------- values
@triton.jit
def init_values(PLAN: tl.constexpr, N: tl.constexpr):
    """(accumulators [rows, N] of every operand, sums of the weights [8, N] of every tier)."""
    acc, sums = (), ()
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            for _ in tl.static_range(value_parts(PLAN, t) * (2 if chunk_paired(PLAN, t, c) else 1)):
                acc = acc + (tl.zeros([value_rows(PLAN, t, c), N], tl.float32),)
        sums = sums + (tl.zeros([8, N], tl.float32),)
    return acc, sums


@triton.jit
def greatest_scale(unit, codes, valid, PLAN: tl.constexpr):
    """The greatest scale of V so far, over all tiers, down to a power of two."""
    for t in tl.static_range(num_tiers(PLAN)):
        if tier_bits(PLAN, t) < 16:
            unit = tl.maximum(unit, floor_power_of_two(scale_of(tl.max(tl.where(valid, codes[t], 0), 0))))
    return unit


@triton.jit
def scaled(acc, factor, wide_factor, PLAN: tl.constexpr):
    """Accumulators times a factor [N]; those of 16-bit tiers, which know no unit, times another."""
    new = ()
    for t in tl.static_range(num_tiers(PLAN)):
        for c in tl.static_range(num_chunks(PLAN, t)):
            for i in tl.static_range(value_parts(PLAN, t) * (2 if chunk_paired(PLAN, t, c) else 1)):
                f = wide_factor if tier_bits(PLAN, t) == 16 else factor
                new = new + (acc[value_index(PLAN, t, c) + i] * f[None, :],)
    return new


@triton.jit
def weights_of(p, inverse_unit, codes, PLAN: tl.constexpr):
    """What multiplies a tier's codes, [TILE, N] fp32 for every tier: p times scales in their unit."""
    weights = ()
    in_unit = p * (inverse_unit * HEADROOM)
    for t in tl.static_range(num_tiers(PLAN)):
        if tier_bits(PLAN, t) == 16:
            weights = weights + (p * HEADROOM,)
        else:
            weights = weights + (in_unit * scale_of(codes[t])[:, None],)
    return weights


@triton.jit
def add_values(acc, all_weights, page, row, pair_page, pair_row, valid, PLAN: tl.constexpr, WIDE: tl.constexpr):
    """A tile's share of sum_t p_t z_t: weights dotted with the codes."""
    new = ()
    for t in tl.static_range(num_tiers(PLAN)):
        weights = to_float(all_weights[t], WIDE if tier_bits(PLAN, t) == 16 else tl.float16)
        for c in tl.static_range(num_chunks(PLAN, t)):
            if chunk_paired(PLAN, t, c):
                words = load_value_pairs(pair_page, pair_row, PLAN, t, c)
                first, second = halves(weights)
                for i in tl.static_range(value_parts(PLAN, t)):
                    codes = value_codes(words, i, PLAN, t)
                    new = new + (dot(codes, first, acc[value_index(PLAN, t, c) + 2 * i], "ieee"),)
                    new = new + (dot(codes, second, acc[value_index(PLAN, t, c) + 2 * i + 1], "ieee"),)
            else:
                words = load_values(page, row, valid, PLAN, t, c, WIDE)
                for i in tl.static_range(value_parts(PLAN, t)):
                    codes = value_codes(words, i, PLAN, t)
                    new = new + (dot(codes, weights, acc[value_index(PLAN, t, c) + i], "ieee"),)
    return new


@triton.jit
def scaled_sums(sums, factor, PLAN: tl.constexpr):
    """Sums of the weights times a factor [N]."""
    new = ()
    for t in tl.static_range(num_tiers(PLAN)):
        new = new + (sums[t] * factor[None, :] if middle(PLAN, t) > 0 else sums[t],)
    return new


@triton.jit
def by_eights(x):
    """[TILE, N] -> [8, N], the sum of every eighth token's, all of which one lane holds."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 8, 8, x.shape[1]]), 0)


@triton.jit
def add_weights(sums, weights, PLAN: tl.constexpr):
    """Sums of the weights by tier, still [8, N]: those are added up once, at the end."""
    new = ()
    for t in tl.static_range(num_tiers(PLAN)):
        new = new + (sums[t] + by_eights(weights[t]) if middle(PLAN, t) > 0 else sums[t],)
    return new


@triton.jit
def store_latent(latent_ptrs, row_ok, acc, sums, unit, inverse_sum, PLAN: tl.constexpr):
    """Take off the codes' middle, normalise and store the split's latent."""
    for t in tl.static_range(num_tiers(PLAN)):
        offset = tl.sum(sums[t], 0) * middle(PLAN, t)
        factor = (unit if tier_bits(PLAN, t) < 16 else 1.0) * (1.0 / HEADROOM) * inverse_sum
        step = 1 if tier_bits(PLAN, t) == 16 else 2
        for c in tl.static_range(num_chunks(PLAN, t)):
            for i in tl.static_range(value_parts(PLAN, t)):
                if chunk_paired(PLAN, t, c):
                    first = acc[value_index(PLAN, t, c) + 2 * i]
                    z = folded(first, acc[value_index(PLAN, t, c) + 2 * i + 1])
                else:
                    z = acc[value_index(PLAN, t, c) + i]
                row = tl.arange(0, z.shape[0])
                z = (z * (1.0 / value_factor(PLAN, t, i)) - offset[None, :]) * factor[None, :]
                mask = row_ok[None, :] & (row < word_width(PLAN, t, c))[:, None]
                ptrs = latent_ptrs[None, :] + (value_first(PLAN, t, c, i) + step * row)[:, None]
                tl.store(ptrs, z, mask=mask)
