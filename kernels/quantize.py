# SPDX-License-Identifier: Apache-2.0
"""A tier's latents -> scale, zero point and codes in a page: the jit helpers of cache_write.

In: fp32 tiles [tokens, PAD] in a flat tuple in the order chunk, part. Out: bytes in the tier's two planes. Meaning:
reference.quantize and pack, of whose clip candidates four are tried at once here. CUTS, a tuple of
(first byte, bytes, power of two) for each chunk of a row, is that of ``cut_row``.
"""

import triton
import triton.language as tl

from kvsplice_kernels.latents import divide, fast_reciprocal, reciprocal
from kvsplice_kernels.packing import (
    CLIP_COUNT_2,
    CLIP_COUNT_4,
    CLIP_STEP_2,
    CLIP_STEP_4,
    INTERPRETED,
    code_offsets,
    round_even,
    scale_ptrs,
    to_float,
    to_fp16,
)
from kvsplice_kernels.plan import (
    chunk_col,
    chunk_pad,
    chunk_width,
    codes_offset,
    has_zero,
    num_chunks,
    num_parts,
    scale_offset,
    tier_bits,
    tier_row,
    tier_start,
)

TOGETHER = tl.constexpr(4)  # clip candidates whose errors one reduction sums; divides both counts
MANY_ROWS = 64  # tokens of a tile from which padding costs more than reductions across warps


# ---------------------------------------------------------------- how a row is cut
@triton.constexpr_function
def cuts_of(plan, t, block_t):
    """Chunks of tier t's row for tiles of block_t tokens: ((first element, elements, power of two), ...).

    With few rows the warps share the columns, if a tile has more columns than rows (Triton lays chained dots out so), and
    one chunk, however padded, is one reduction across warps. With many rows padding is what costs.
    """
    if block_t < MANY_ROWS:
        return ((0, tier_row(plan, t), max(2 * block_t, triton.next_power_of_2(tier_row(plan, t)))),)
    return tuple(
        (chunk_col(plan, t, c), chunk_width(plan, t, c), chunk_pad(plan, t, c)) for c in range(num_chunks(plan, t))
    )


@triton.constexpr_function
def width_of(plan, t, block_t):
    """Columns of all tiles of a tier, padding included."""
    return num_parts(plan, t) * sum(cut[2] for cut in cuts_of(plan, t, block_t))


@triton.constexpr_function
def num_cuts(cuts):
    return len(cuts)


@triton.constexpr_function
def is_padded(cuts, c):
    return cuts[c][1] < cuts[c][2]


@triton.constexpr_function
def cut_col(cuts, c):
    return cuts[c][0]


@triton.constexpr_function
def cut_width(cuts, c):
    return cuts[c][1]


@triton.constexpr_function
def cut_pad(cuts, c):
    return cuts[c][2]


@triton.jit
def own_columns(CUTS: tl.constexpr, c: tl.constexpr):
    """Columns [PAD] of a chunk that are not padding."""
    return tl.arange(0, cut_pad(CUTS, c)) < cut_width(CUTS, c)


@triton.jit
def part_dims(i: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr, c: tl.constexpr):
    """Latent dimensions [PAD] of part i of a chunk; those from WIDTH on belong to others."""
    return tier_start(PLAN, t) + i * tier_row(PLAN, t) + cut_col(CUTS, c) + tl.arange(0, cut_pad(CUTS, c))


# ---------------------------------------------------------------- scale and zero point


@triton.jit
def _low_high(low_a, high_a, low_b, high_b):
    return tl.minimum(low_a, low_b), tl.maximum(high_a, high_b)


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _own(tile, fill, CUTS: tl.constexpr, c: tl.constexpr):
    """A tile of chunk c with ``fill`` in the columns that are padding."""
    if is_padded(CUTS, c):
        return tl.where(own_columns(CUTS, c)[None, :], tile, fill)
    else:
        return tile


@triton.jit
def _range_of(z, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """Least and greatest latent [tokens] of a tier."""
    for c in tl.static_range(num_cuts(CUTS)):
        low, high = z[c * num_parts(PLAN, t)], z[c * num_parts(PLAN, t)]
        for i in tl.static_range(1, num_parts(PLAN, t)):
            low = tl.minimum(low, z[c * num_parts(PLAN, t) + i])
            high = tl.maximum(high, z[c * num_parts(PLAN, t) + i])
        both = (_own(low, float("inf"), CUTS, c), _own(high, float("-inf"), CUTS, c))
        row_low, row_high = tl.reduce(both, 1, _low_high)
        if c == 0:
            least, greatest = row_low, row_high
        else:
            least, greatest = tl.minimum(least, row_low), tl.maximum(greatest, row_high)
    return least, greatest


@triton.jit
def _greatest_magnitude(z, CUTS: tl.constexpr):
    """max |latent| [tokens] of an 8-bit tier; padding columns hold zeros."""
    greatest = tl.max(tl.abs(z[0]), 1)
    for c in tl.static_range(1, num_cuts(CUTS)):
        greatest = tl.maximum(greatest, tl.max(tl.abs(z[c]), 1))
    return greatest


@triton.jit
def _candidate(middle, half, SHARE: tl.constexpr, HIGH: tl.constexpr):
    """fp16 (scale, zero) [tokens] of a range shrunk to SHARE, as fp32, and 1 / scale."""
    shrunk = half * SHARE
    scale = to_fp16(divide(2.0 * shrunk, HIGH)).to(tl.float32)
    zero = to_fp16(middle - shrunk).to(tl.float32)
    return scale, zero, fast_reciprocal(scale)


@triton.jit
def _share(z, a, b):
    """z * a + b held within 0 .. 1."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(z * a + b, 0.0), 1.0)
    else:  # which the multiplier does by itself
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=r,r,r,r", [z, a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _squares(
    z, zero, inverse, HIGH: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr, c: tl.constexpr
):
    """Squared rounding and clipping errors of one candidate, in units of scale**2, the parts of a chunk added up."""
    shape: tl.constexpr = z[c * num_parts(PLAN, t)].shape
    shift = -zero * inverse
    a, b = tl.broadcast_to(inverse[:, None], shape), tl.broadcast_to(shift[:, None], shape)
    share_a, share_b = (
        tl.broadcast_to((inverse * (1.0 / HIGH))[:, None], shape),
        tl.broadcast_to((shift * (1.0 / HIGH))[:, None], shape),
    )
    total = tl.zeros(shape, tl.float32)
    for i in tl.static_range(num_parts(PLAN, t)):
        latent = z[c * num_parts(PLAN, t) + i]
        off = round_even(_share(latent, share_a, share_b) * HIGH) - tl.fma(latent, a, b)
        total += off * off
    return _own(total, 0.0, CUTS, c)


@triton.jit
def _errors(z, zeros, inverses, HIGH: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """Squared errors [tokens] of TOGETHER candidates, in units of their scale**2."""
    for c in tl.static_range(num_cuts(CUTS)):
        squares = ()
        for k in tl.static_range(TOGETHER):
            squares = squares + (_squares(z, zeros[k], inverses[k], HIGH, PLAN, t, CUTS, c),)
        s0, s1, s2, s3 = tl.reduce(squares, 1, _add_four)
        if c == 0:
            e0, e1, e2, e3 = s0, s1, s2, s3
        else:
            e0, e1, e2, e3 = e0 + s0, e1 + s1, e2 + s2, e3 + s3
    return e0, e1, e2, e3


@triton.jit
def _clip_search(z, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """Scale and zero point [tokens] fp32, of the candidate with the least squared error; the first of equals."""
    HIGH: tl.constexpr = (1 << tier_bits(PLAN, t)) - 1
    COUNT: tl.constexpr = CLIP_COUNT_4 if tier_bits(PLAN, t) == 4 else CLIP_COUNT_2
    STEP: tl.constexpr = CLIP_STEP_4 if tier_bits(PLAN, t) == 4 else CLIP_STEP_2
    low, high = _range_of(z, PLAN, t, CUTS)
    middle, half = (low + high) * 0.5, (high - low) * 0.5
    for first in tl.static_range(0, COUNT, TOGETHER):
        scales, zeros, inverses = (), (), ()
        for k in tl.static_range(TOGETHER):
            scale, zero, inverse = _candidate(middle, half, 1.0 - (first + k) * STEP, HIGH)
            scales, zeros, inverses = scales + (scale,), zeros + (zero,), inverses + (inverse,)
        errors = _errors(z, zeros, inverses, HIGH, PLAN, t, CUTS)
        for k in tl.static_range(TOGETHER):
            # NaN for a zero scale, which is never better; and if the first is NaN, all are.
            error = errors[k] * scales[k] * scales[k]
            if first + k == 0:
                best, best_scale, best_zero = error, scales[0], zeros[0]
            else:
                better = error < best
                best = tl.where(better, error, best)
                best_scale, best_zero = tl.where(better, scales[k], best_scale), tl.where(better, zeros[k], best_zero)
    return best_scale, best_zero


@triton.jit
def scale_and_zero(z, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """fp32 numbers that fp16 holds, [tokens]: absolute maximum at 8 bits, else the clip search."""
    if tier_bits(PLAN, t) == 8:
        scale = to_fp16(divide(_greatest_magnitude(z, CUTS), 127.0)).to(tl.float32)
        return scale, tl.zeros(scale.shape, tl.float32)
    else:
        return _clip_search(z, PLAN, t, CUTS)


@triton.jit
def _store_scale(scale, zero, page, row, kept, PLAN: tl.constexpr, t: tl.constexpr):
    ptrs = scale_ptrs(page, row, PLAN, t)
    if has_zero(PLAN, t):  # (zero point, scale) as one word
        low = zero.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = low | (scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
        tl.store((ptrs - 1).to(tl.pointer_type(tl.int32)), word, mask=kept)
    else:
        tl.store(ptrs, scale.to(tl.float16), mask=kept)


@triton.jit
def _code(z, scale, inverse, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Nearest code of z [tokens, dims], ties to even, in the lowest byte of an int32; scale, inverse, zero [tokens]."""
    z -= zero[:, None]
    code = z * inverse[:, None]
    if INTERPRETED:  # whose fma rounds twice
        code = tl.where((inverse > 0)[:, None], tl.div_rn(z, tl.where(inverse > 0, scale, 1.0)[:, None] + z * 0.0), 0.0)
    else:  # one step of Newton's method makes it the correctly rounded quotient
        remainder = tl.fma(-code, tl.broadcast_to(scale[:, None], z.shape), z)
        code = tl.fma(remainder, tl.broadcast_to(inverse[:, None], z.shape), code)
    code = tl.minimum(tl.maximum(code, LOW), HIGH)
    return (code + 12582912.0).to(
        tl.int32, bitcast=True
    )  # 1.5 * 2**23 leaves no bits for a fraction, its low byte is 0


@triton.jit
def _store_chunk(
    z,
    scale,
    inverse,
    zero,
    page,
    row,
    kept,
    PLAN: tl.constexpr,
    t: tl.constexpr,
    CUTS: tl.constexpr,
    c: tl.constexpr,
    WIDE: tl.constexpr,
):
    plane = page + codes_offset(PLAN, t)
    if tier_bits(PLAN, t) == 16:
        plane = plane.to(tl.pointer_type(WIDE))
    col = cut_col(CUTS, c) + tl.arange(0, cut_pad(CUTS, c))
    ptrs = plane[:, None] + code_offsets(row[:, None], col[None, :], PLAN, t)
    mask = kept[:, None]
    if is_padded(CUTS, c):
        mask = mask & own_columns(CUTS, c)[None, :]
    if tier_bits(PLAN, t) == 16:
        tl.store(ptrs, to_float(z[c], WIDE), mask=mask)
    else:
        LOW: tl.constexpr = -127 if tier_bits(PLAN, t) == 8 else 0
        HIGH: tl.constexpr = 127 if tier_bits(PLAN, t) == 8 else (1 << tier_bits(PLAN, t)) - 1
        packed = tl.zeros(z[c * num_parts(PLAN, t)].shape, tl.int32)
        for i in tl.static_range(num_parts(PLAN, t)):
            code = _code(z[c * num_parts(PLAN, t) + i], scale, inverse, zero, LOW, HIGH)
            packed = packed | ((code & ((1 << tier_bits(PLAN, t)) - 1)) << (i * tier_bits(PLAN, t)))
        tl.store(ptrs, packed.to(tl.uint8), mask=mask)


@triton.jit
def store_tier(z, page, row, kept, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr, WIDE: tl.constexpr):
    """Quantise a tier's tiles and store them at rows [tokens] of pages [tokens], where ``kept``."""
    scale, zero = tl.zeros(row.shape, tl.float32), tl.zeros(row.shape, tl.float32)
    if scale_offset(PLAN, t) >= 0:
        scale, zero = scale_and_zero(z, PLAN, t, CUTS)
        _store_scale(scale, zero, page, row, kept, PLAN, t)
    inverse = reciprocal(scale)
    for c in tl.static_range(num_cuts(CUTS)):
        _store_chunk(z, scale, inverse, zero, page, row, kept, PLAN, t, CUTS, c, WIDE)
