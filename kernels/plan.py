# SPDX-License-Identifier: Apache-2.0
"""Numbers that kernels read off a tier plan while they are compiled, and launchers before.

A plan is LatentLayout.plan: a tuple of (bits, dims, start, codes_offset, scale_offset, block_size, pairs), one for each stored
tier. A tier's row of one token is bytes (16-bit words at 16 bits), cut into *chunks* of a power of two (layout.runs), each
a plane of its own. A byte holds ``num_parts`` codes; part i of a chunk is a run of consecutive dimensions, so that every (chunk,
part) is one operand of a dot. Kernels keep one tile for each in a flat tuple, in the order tier, chunk, part.
"""

from functools import lru_cache

import triton

Plan = tuple[tuple[int, ...], ...]
MIN_DOT = 16  # the least contraction of a tl.dot of 16-bit floats


@lru_cache(maxsize=256)
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
def block_size_of(plan, t):
    """Tokens of a block."""
    return plan[t][5]


@triton.constexpr_function
def chunk_paired(plan, t, c):
    """Whether chunk c holds its tokens in pairs, see layout.unit_of."""
    bits, pairs = plan[t][0], plan[t][6]
    return pairs and bits < 16 and _cut(plan[t])[c][1] == 16


@triton.constexpr_function
def middle(plan, t):
    """The code that stands for zero, reference.middle: half-way between two of them at 4 and 2 bits."""
    bits = plan[t][0]
    return (2**bits - 1) / 2 if bits < 8 else 0.0


@triton.constexpr_function
def _row(tier):
    bits, dims = tier[:2]
    return dims if bits == 16 else dims * bits // 8


@triton.constexpr_function
def _parts(tier):
    return max(1, 8 // tier[0])


@triton.constexpr_function
def _cut(tier):
    """[(first element, elements, the same padded for a dot)] of a row, as layout.runs cuts it."""
    row, cuts, col = _row(tier), [], 0
    while col < row:
        width = 1 << ((row - col).bit_length() - 1)
        cuts.append((col, width, max(MIN_DOT, width)))
        col += width
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
