# SPDX-License-Identifier: Apache-2.0
"""A tier's latents -> scale and codes in a page: the jit helpers of cache_write.

In: fp32 tiles [tokens, PAD] in a flat tuple in the order chunk, part. Out: bytes in the tier's two planes. Meaning:
reference.quantize and pack, of whose clip candidates four are tried at once here, those of 2 bits by another sum. CUTS, a tuple of
(first byte, bytes, power of two) for each chunk of a row, is that of ``cuts_of``.
"""

import triton
import triton.language as tl

from kvsplice_kernels.latents import divide, fast_reciprocal, reciprocal
from kvsplice_kernels.packing import (
    INTERPRETED,
    code_offsets,
    round_even,
    scale_code,
    scale_of,
    scale_ptrs,
    to_float,
)
from kvsplice_kernels.plan import (
    chunk_col,
    chunk_pad,
    chunk_width,
    codes_offset,
    middle,
    num_chunks,
    num_parts,
    scale_offset,
    tier_bits,
    tier_row,
    tier_start,
)

# Clip candidates by bit width, reference.CLIP_FIRST and CLIP_COUNT.
CLIP_FIRST_2 = tl.constexpr(3)
CLIP_COUNT_4 = tl.constexpr(4)
CLIP_COUNT_2 = tl.constexpr(8)
TOGETHER = tl.constexpr(4)  # candidates whose errors one reduction sums; divides both counts
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


@triton.constexpr_function
def own_dims(plan, t, cuts):
    """Dimensions of a tier, over all of its tiles."""
    return num_parts(plan, t) * sum(cut[1] for cut in cuts)


@triton.constexpr_function
def padding(plan, t, cuts):
    """Columns of its tiles that are padding."""
    return num_parts(plan, t) * sum(cut[2] - cut[1] for cut in cuts)


@triton.jit
def own_columns(CUTS: tl.constexpr, c: tl.constexpr):
    """Columns [PAD] of a chunk that are not padding."""
    return tl.arange(0, cut_pad(CUTS, c)) < cut_width(CUTS, c)


@triton.jit
def part_dims(i: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr, c: tl.constexpr):
    """Latent dimensions [PAD] of part i of a chunk; those from WIDTH on belong to others."""
    return tier_start(PLAN, t) + i * tier_row(PLAN, t) + cut_col(CUTS, c) + tl.arange(0, cut_pad(CUTS, c))


# ---------------------------------------------------------------- scale
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
def _magnitudes(z, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """max and sum of |latent| [tokens] of a tier; padding columns hold zeros. What is not used is not computed."""
    greatest = tl.zeros([z[0].shape[0]], tl.float32)
    total = greatest
    for c in tl.static_range(num_cuts(CUTS)):
        tile = tl.abs(z[c * num_parts(PLAN, t)])
        added = tile
        for i in tl.static_range(1, num_parts(PLAN, t)):
            part = tl.abs(z[c * num_parts(PLAN, t) + i])
            tile, added = tl.maximum(tile, part), added + part
        greatest, total = tl.maximum(greatest, tl.max(tile, 1)), total + tl.sum(added, 1)
    return greatest, total


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
def _squares(z, inverse, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr, c: tl.constexpr):
    """Squared rounding and clipping errors of one candidate, in units of scale**2, the parts of a chunk added up."""
    shape: tl.constexpr = z[c * num_parts(PLAN, t)].shape
    HIGH: tl.constexpr = 2 * middle(PLAN, t)
    a, share = tl.broadcast_to(inverse[:, None], shape), tl.broadcast_to((inverse * (1.0 / HIGH))[:, None], shape)
    half, zero_code = tl.full(shape, 0.5, tl.float32), tl.full(shape, middle(PLAN, t), tl.float32)
    total = tl.zeros(shape, tl.float32)
    for i in tl.static_range(num_parts(PLAN, t)):
        latent = z[c * num_parts(PLAN, t) + i]
        off = round_even(_share(latent, share, half) * HIGH) - tl.fma(latent, a, zero_code)
        total += off * off
    return _own(total, 0.0, CUTS, c)


@triton.jit
def _greater(z, scale, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr):
    """max(|latent|, scale), the parts of a chunk added up, padding included."""
    scale = tl.broadcast_to(scale[:, None], z[c * num_parts(PLAN, t)].shape)
    total = tl.zeros(scale.shape, tl.float32)
    for i in tl.static_range(num_parts(PLAN, t)):
        total += tl.maximum(tl.abs(z[c * num_parts(PLAN, t) + i]), scale)
    return total


@triton.jit
def _sums(z, scales, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """For TOGETHER candidates what _error wants, [tokens]: at 4 bits the sum of _squares, at 2 bits of _greater."""
    for c in tl.static_range(num_cuts(CUTS)):
        terms = ()
        for k in tl.static_range(TOGETHER):
            if tier_bits(PLAN, t) == 2:
                terms = terms + (_greater(z, scales[k], PLAN, t, c),)
            else:
                terms = terms + (_squares(z, fast_reciprocal(scales[k]), PLAN, t, CUTS, c),)
        s0, s1, s2, s3 = tl.reduce(terms, 1, _add_four)
        if c == 0:
            e0, e1, e2, e3 = s0, s1, s2, s3
        else:
            e0, e1, e2, e3 = e0 + s0, e1 + s1, e2 + s2, e3 + s3
    return e0, e1, e2, e3


@triton.jit
def _error(total, scale, magnitude, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """Squared error [tokens] of a scale, less what all scales share, from its _sums.

    2-bit codes stand for +-s/2 and, where |z| > s, +-3s/2: sum (|z| - s/2)^2 - [|z| > s] 2s(|z| - s) over n dimensions is
    sum z^2 + s (9/4 n s - sum |z| - 2 sum max(|z|, s)). ``magnitude``: sum |z|. Each padding column adds s to the last sum.
    """
    if tier_bits(PLAN, t) == 2:
        own: tl.constexpr = 2.25 * own_dims(PLAN, t, CUTS) + 2.0 * padding(PLAN, t, CUTS)
        return scale * (own * scale - magnitude - 2.0 * total)
    else:
        return total * scale * scale


@triton.jit
def _clip_search(z, covers, magnitude, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """Scale byte [tokens] int32 of the candidate with the least squared error; the first of equals. ``magnitude``: _error."""
    FIRST: tl.constexpr = CLIP_FIRST_2 if tier_bits(PLAN, t) == 2 else 0
    COUNT: tl.constexpr = CLIP_COUNT_2 if tier_bits(PLAN, t) == 2 else CLIP_COUNT_4
    best = tl.maximum(covers - FIRST, 0)
    least = tl.full(covers.shape, float("inf"), tl.float32)
    for first in range(FIRST, FIRST + COUNT, TOGETHER):  # not unrolled, which takes Triton half as long again
        codes, scales = (), ()
        for k in tl.static_range(TOGETHER):
            code = tl.maximum(covers - (first + k), 0)
            codes, scales = codes + (code,), scales + (scale_of(code),)
        sums = _sums(z, scales, PLAN, t, CUTS)
        for k in tl.static_range(TOGETHER):
            error = _error(sums[k], scales[k], magnitude, PLAN, t, CUTS)
            best = tl.where(error < least, codes[k], best)
            least = tl.minimum(error, least)
    return best


@triton.jit
def _best_scale(z, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr):
    """Scale byte [tokens] int32: the one that covers the row at 8 bits, else the clip search's."""
    greatest, magnitude = _magnitudes(z, PLAN, t, CUTS)
    if tier_bits(PLAN, t) == 8:
        return scale_code(divide(greatest, 127.0))
    else:
        return _clip_search(z, scale_code(divide(greatest, middle(PLAN, t))), magnitude, PLAN, t, CUTS)


@triton.jit
def _code(z, scale, inverse, MIDDLE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Nearest code of z [tokens, dims], ties to even, in the lowest byte of an int32; scale, inverse [tokens]."""
    code = z * inverse[:, None]
    if INTERPRETED:  # whose fma rounds twice
        code = tl.div_rn(z, scale[:, None] + z * 0.0)
    else:  # one step of Newton's method makes it the correctly rounded quotient
        remainder = tl.fma(-code, tl.broadcast_to(scale[:, None], z.shape), z)
        code = tl.fma(remainder, tl.broadcast_to(inverse[:, None], z.shape), code)
    code = tl.minimum(tl.maximum(code + MIDDLE, LOW), HIGH)
    return (code + 12582912.0).to(
        tl.int32, bitcast=True
    )  # 1.5 * 2**23 leaves no bits for a fraction, its low byte is 0


@triton.jit
def _store_chunk(
    z,
    scale,
    inverse,
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
            code = _code(z[c * num_parts(PLAN, t) + i], scale, inverse, middle(PLAN, t), LOW, HIGH)
            packed = packed | ((code & ((1 << tier_bits(PLAN, t)) - 1)) << (i * tier_bits(PLAN, t)))
        tl.store(ptrs, packed.to(tl.uint8), mask=mask)


@triton.jit
def store_tier(z, page, row, kept, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr, WIDE: tl.constexpr):
    """Quantise a tier's tiles and store them at rows [tokens] of pages [tokens], where ``kept``."""
    scale = tl.full(row.shape, 1.0, tl.float32)
    if scale_offset(PLAN, t) >= 0:
        code = _best_scale(z, PLAN, t, CUTS)
        tl.store(scale_ptrs(page, row, PLAN, t), code.to(tl.uint8), mask=kept)
        scale = scale_of(code)
    inverse = reciprocal(scale)
    for c in tl.static_range(num_cuts(CUTS)):
        _store_chunk(z, scale, inverse, page, row, kept, PLAN, t, CUTS, c, WIDE)
