# SPDX-License-Identifier: Apache-2.0
"""Numbers that kernels read off a tier plan while they are compiled, and launchers before.

A plan is LatentLayout.plan: a tuple of (bits, dims, start, codes_offset, scale_offset), one for each stored
tier. A tier's row of one token is bytes (16-bit words at 16 bits), cut into *chunks* with power-of-two sides, as Triton
wants them. A byte holds ``num_parts`` codes; part i of a chunk is a run of consecutive dimensions, so that every (chunk,
part) is one operand of a dot. Kernels keep one tile for each in a flat tuple, in the order tier, chunk, part.
"""

import triton

Plan = tuple[tuple[int, ...], ...]
MIN_DOT = 16  # the least contraction of a tl.dot of 16-bit floats


def rank_of(plan: Plan) -> int:
    """Latent dimensions of a plan."""
    return sum(tier[1] for tier in plan)


@triton.constexpr_function
def num_tiers(plan):
    """Stored tiers of a plan."""
    return len(plan)


@triton.constexpr_function
def tier_bits(plan, t):
    """Bits of tier t: 16, 8, 4 or 2."""
    return plan[t][0]


@triton.constexpr_function
def tier_start(plan, t):
    """First latent dimension of tier t."""
    return plan[t][2]


@triton.constexpr_function
def codes_offset(plan, t):
    """Byte in the page where tier t's codes start."""
    return plan[t][3]


@triton.constexpr_function
def scale_offset(plan, t):
    """Byte in the page where tier t's scales start, or -1."""
    return plan[t][4]


@triton.constexpr_function
def has_zero(plan, t):
    """Whether tier t's scale plane holds a zero point beside each scale."""
    return plan[t][0] in (4, 2)


@triton.constexpr_function
def _row(tier):
    bits, dims = tier[:2]
    return dims if bits == 16 else dims * bits // 8


@triton.constexpr_function
def _parts(tier):
    return max(1, 8 // tier[0])


@triton.constexpr_function
def _cut(tier):
    """[(first element, elements, power of two)] of a row; the last chunk is padded if short, or if little is wasted."""
    row, cuts, col = _row(tier), [], 0
    while col < row:
        rest = row - col
        above = max(MIN_DOT, 1 << (rest - 1).bit_length())
        pad = above if above == MIN_DOT or rest * 8 >= above * 7 else above // 2
        cuts.append((col, min(rest, pad), pad))
        col += pad
    return cuts


@triton.constexpr_function
def tier_row(plan, t):
    """Elements of a token's row of tier t."""
    return _row(plan[t])


@triton.constexpr_function
def num_parts(plan, t):
    """Codes of a byte of tier t."""
    return _parts(plan[t])


@triton.constexpr_function
def num_chunks(plan, t):
    """Chunks of tier t."""
    return len(_cut(plan[t]))


@triton.constexpr_function
def chunk_col(plan, t, c):
    """First element of chunk c in the row of tier t."""
    return _cut(plan[t])[c][0]


@triton.constexpr_function
def chunk_width(plan, t, c):
    """Elements of chunk c of tier t."""
    return _cut(plan[t])[c][1]


@triton.constexpr_function
def chunk_pad(plan, t, c):
    """Elements of chunk c of tier t with padding, a power of two."""
    return _cut(plan[t])[c][2]


@triton.constexpr_function
def chunk_part(plan, t, c):
    """Index of the first part of chunk c of tier t in the flat tuple of all parts."""
    return sum(len(_cut(tier)) * _parts(tier) for tier in plan[:t]) + c * _parts(plan[t])
