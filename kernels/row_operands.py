# SPDX-License-Identifier: Apache-2.0
"""Operands of decode_rows: queries, and a tile of keys or values unpacked as one, in an order of columns that costs nothing.

In: q_latent, pages of codes, plans. Out: [rows, columns] tiles of fp16, and of the model's floats for 16-bit tiers; and the bases in
that order of columns, so that queries come and latents go in it (in_columns). A side has one tile of all its codes: a dot,
a barrier and a fence for every chunk of them cost more than the chunks, and dots of several widths came out wrong (Triton 3.6,
sm_90). Codes are loaded and unpacked in words of four bytes.

An unpacked latent is exact under scales from 2**-15 on: a code of 8 bits times a scale of 4 has 11, fp16's significand, and in
units of UNIT the greatest scale's products are below 65504. Smaller scales, of rows whose greatest magnitude is 4e-3 or less (8 bits),
are rounded to multiples of 2**-19, of which decode knows nothing. Queries are fp16 in units of a power of two.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kvsplice_kernels.encode import Prepared
from kvsplice_kernels.packing import (
    INTERPRETED,
    floor_power_of_two,
    inverse_power_of_two,
    scale_of,
    to_float,
    unit_of,
)
from kvsplice_kernels.plan import (
    MIN_DOT,
    Plan,
    block_size_of,
    chunk_col,
    chunk_width,
    codes_offset,
    middle,
    num_chunks,
    num_tiers,
    tier_bits,
    tier_row,
    tier_start,
)

UNIT = tl.constexpr(32.0)  # of unpacked latents: 127 times the greatest scale, 1.875 * 2**13, is below 65504 of them
PIECE = 32  # bytes of codes


# ---------------------------------------------------------------- columns of a tile
@triton.constexpr_function
def _pieces(plan, wide):
    """[(tier, chunk, first element in it, elements)] that a tile is made of: 16-bit tiers, or else codes in runs that two threads
    load for each token, so that all pieces lie in registers alike. 8-bit codes that are one run have no others to lie like, and are
    loaded whole: lines of 128 bytes, not quarters of them. Of fewer bits that is unmeasured."""
    chunks = [
        (t, c) for t in range(num_tiers(plan)) if (tier_bits(plan, t) == 16) == wide for c in range(num_chunks(plan, t))
    ]
    found = []
    for t, c in chunks:
        width = chunk_width(plan, t, c)
        whole = wide or (len(chunks) == 1 and tier_bits(plan, t) == 8)
        step = width if whole else min(width, PIECE)
        found += [(t, c, first, step) for first in range(0, width, step)]
    return found


@triton.constexpr_function
def _num_pieces(plan, wide):
    return len(_pieces(plan, wide))


@triton.constexpr_function
def _widths(plan, wide):
    """Of the pieces side by side: elements of 16-bit tiers, words of two unpacked codes else."""
    return [n if wide else max(1, n // 4) * 16 // tier_bits(plan, t) for t, _, _, n in _pieces(plan, wide)]


@triton.constexpr_function
def _merges(plan, wide):
    """[(left, right)] of what lies side by side, numbers of pieces and of earlier merges: equal widths, the narrowest first;
    right -1: zeros. The last of all is the tile, a power of two and no less than a dot takes."""
    widths, steps, least = _widths(plan, wide), [], MIN_DOT if wide else MIN_DOT // 2
    left = list(range(len(widths)))
    while left and (len(left) > 1 or widths[left[0]] < least):
        left.sort(key=lambda i: widths[i])
        alike = len(left) > 1 and widths[left[0]] == widths[left[1]]
        steps.append((left[0], left[1] if alike else -1))
        widths.append(2 * widths[left[0]])
        left = left[2 if alike else 1 :] + [len(widths) - 1]
    return steps


@triton.constexpr_function
def _num_merges(plan, wide):
    return len(_merges(plan, wide))


@triton.constexpr_function
def num_columns(plan, wide):
    """Columns of a tile, 0 where there is none."""
    widths = _widths(plan, wide)
    for left, _ in _merges(plan, wide):
        widths.append(2 * widths[left])
    return (widths[-1] if wide else 2 * widths[-1]) if widths else 0


@triton.constexpr_function
def _run(width, wide):
    """Columns that stay together: 16 bytes where they are keys or values, elements of 16-bit tiers or words of two codes."""
    most = 8 if wide else 4
    return width if width >= 8 * most else min(most, max(1, width // 4))


@triton.jit
def _beside(a, b, WIDE_ONES: tl.constexpr):
    """Columns of both, in alternating runs that stay whole in a thread: nothing moves. From 128 bytes on, a
    row of shared memory, one after the other: then the two threads of a token store to different banks."""
    R: tl.constexpr = a.shape[0]
    W: tl.constexpr = a.shape[1]
    RUN: tl.constexpr = _run(W, WIDE_ONES)
    joined = tl.join(tl.reshape(a, [R, W // RUN, RUN]), tl.reshape(b, [R, W // RUN, RUN]))
    return tl.reshape(tl.permute(joined, (0, 1, 3, 2)), [R, 2 * W])


@triton.jit
def _tile_of(parts, PLAN: tl.constexpr, WIDE_ONES: tl.constexpr):
    """Pieces [R, width] side by side, as _merges says."""
    for i in tl.static_range(_num_merges(PLAN, WIDE_ONES)):
        left = parts[_merges(PLAN, WIDE_ONES)[i][0]]
        if _merges(PLAN, WIDE_ONES)[i][1] < 0:
            parts = parts + (_beside(left, tl.zeros_like(left), WIDE_ONES),)
        else:
            parts = parts + (_beside(left, parts[_merges(PLAN, WIDE_ONES)[i][1]], WIDE_ONES),)
    return parts[len(parts) - 1]


@triton.constexpr_function
def _whole(plan):
    """(threads that load a token's codes, 16 bytes each; rows of shared memory, 128 bytes, that they fill) of a tile of one
    piece; (1, 1), by which _in_rows changes nothing, of others."""
    if _num_pieces(plan, False) != 1:
        return 1, 1
    return max(1, _pieces(plan, False)[0][3] // 16), max(1, _widths(plan, False)[0] // 32)


@triton.jit
def _in_rows(words, THREADS: tl.constexpr, ROWS: tl.constexpr):
    """Columns of a tile of one piece so that threads beside one another store to one row of shared memory, other banks."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    runs = tl.reshape(words, [R, THREADS, ROWS, W // (THREADS * ROWS)])
    return tl.reshape(tl.permute(runs, (0, 2, 1, 3)), [R, W])


@triton.jit
def _alternating(low, high):
    """Columns of two tiles [R, W] in turn, [R, 2 W]."""
    return tl.reshape(tl.join(low, high), [low.shape[0], 2 * low.shape[1]])


@lru_cache(maxsize=256)
def column_order(plan: Plan) -> tuple[int, ...]:
    """Latent dimensions of the columns of a side, those of its codes and then of its 16-bit tiers; -1: padding."""
    return *_order(plan, False), *_order(plan, True)


def _order(plan: Plan, wide: bool) -> list[int]:
    """What wide_tile or code_tile do, of dimensions instead of numbers."""
    if wide:
        return _merged(plan, wide, 0)
    halves = [torch.tensor(_merged(plan, wide, half)).view(*_whole(plan), -1).transpose(0, 1) for half in (0, 1)]
    return [int(d) for d in torch.stack(halves, dim=-1).flatten()]


def _merged(plan: Plan, wide: bool, half: int) -> list[int]:
    parts = [_piece_dims(plan, wide, i, half) for i in range(_num_pieces(plan, wide))]
    for left, right in _merges(plan, wide):
        a, b = parts[left], parts[right] if right >= 0 else [-1] * len(parts[left])
        run = _run(len(a), wide)
        parts.append([d for i in range(0, len(a), run) for d in a[i : i + run] + b[i : i + run]])
    return parts[-1] if parts else []


def _piece_dims(plan: Plan, wide: bool, i: int, half: int) -> list[int]:
    """Of a piece's columns; of words those of their lower (half 0) or upper codes."""
    t, c, first, elements = _pieces(plan, wide)[i]
    start = tier_start(plan, t) + chunk_col(plan, t, c) + first
    if wide:
        return [start + column for column in range(elements)]
    bits, dims = tier_bits(plan, t), []
    for column in range(_widths(plan, wide)[i]):
        word, code = divmod(column, 16 // bits)  # unpacked words of one that is loaded: see _words_asm
        bit = code * bits + 16 * half
        byte, part = word * 4 + bit // 8, bit % 8 // bits
        dims.append(start + part * tier_row(plan, t) + byte if byte < elements else -1)
    return dims


def in_columns(prepared: Prepared, k_plan: Plan, v_plan: Plan) -> Prepared:
    """A layer's bases for launches with queries as rows: project_query makes the columns of K, and reduce_expand takes those of V, in the
    order that decode_rows has them in.

    Args:
        prepared: of encode.prepare. k_plan, v_plan: LatentLayout.plan("k" | "v", any block size).
    Returns:
        The same with k_columns and v_columns, as wide as column_order is long; columns of padding are zeros.
    """
    k, v = (torch.tensor(column_order(plan), device=prepared.k_decode.device) for plan in (k_plan, v_plan))
    k_columns = prepared.k_decode[:, :, k.clamp(min=0)].contiguous()
    v_columns = prepared.v_decode[:, :, :, v.clamp(min=0)].contiguous()
    k_columns[:, :, k < 0], v_columns[:, :, :, v < 0] = 0, 0
    return prepared._replace(k_columns=k_columns, v_columns=v_columns)


# ---------------------------------------------------------------- operands
@triton.jit
def _load_columns(q_ptrs, row_ok, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Queries [M, COUNT] of a tile; zeros where there is none."""
    if COUNT > 0:
        return tl.load(q_ptrs[:, None] + (FIRST + tl.arange(0, COUNT))[None, :], mask=row_ok[:, None], other=0.0)
    else:
        return tl.zeros([row_ok.shape[0], 16], tl.float32)


@triton.jit
def load_query_rows(q_ptrs, row_ok, PLAN: tl.constexpr, WIDE: tl.constexpr):
    """Operands [M, columns] of both tiles, and the power of two [M] that they are in units of."""
    CODES: tl.constexpr = num_columns(PLAN, False)
    q = _load_columns(q_ptrs, row_ok, 0, CODES)
    q_wide = _load_columns(q_ptrs, row_ok, CODES, num_columns(PLAN, True))
    unit = floor_power_of_two(tl.maximum(tl.max(tl.abs(q), 1), tl.max(tl.abs(q_wide), 1)))
    inverse = inverse_power_of_two(unit)[:, None]
    return (q * inverse).to(tl.float16), to_float(q_wide * inverse * (1.0 / UNIT), WIDE), unit  # wide keys are in none


@triton.constexpr_function
def fits(k_plan, v_plan):
    """Whether a row of the output's latent, fp32, holds a row of 16-bit queries."""
    return 2 * sum(num_columns(k_plan, wide) for wide in (False, True)) <= 4 * sum(
        num_columns(v_plan, wide) for wide in (False, True)
    )


@triton.jit
def through_memory(x, row_ptrs, row_ok):
    """x [M, columns] of 16 bits, stored and loaded again: the compiler lets the tensor cores read what is loaded from shared
    memory; what is computed it would copy to registers in every tile."""
    ptrs = row_ptrs.to(tl.pointer_type(x.dtype))[:, None] + tl.arange(0, x.shape[1])[None, :]
    tl.store(ptrs, x, mask=row_ok[:, None])
    tl.debug_barrier()
    return tl.load(ptrs, mask=row_ok[:, None], other=0.0)


@triton.jit
def _piece_ptrs(page, place, PLAN: tl.constexpr, WIDE_ONES: tl.constexpr, i: tl.constexpr, TYPE: tl.constexpr):
    """Pointers [TILE, elements] to a piece of tokens ``place``, as elements of TYPE; page: one pointer, or one for each."""
    t: tl.constexpr = _pieces(PLAN, WIDE_ONES)[i][0]
    c: tl.constexpr = _pieces(PLAN, WIDE_ONES)[i][1]
    BYTES: tl.constexpr = TYPE.primitive_bitwidth // 8
    STORED: tl.constexpr = 2 if WIDE_ONES else 1
    start: tl.constexpr = (block_size_of(PLAN, t) * chunk_col(PLAN, t, c) + _pieces(PLAN, WIDE_ONES)[i][2]) * STORED
    plane = (page + (codes_offset(PLAN, t) + start)).to(tl.pointer_type(TYPE))
    if len(page.shape) == 1:
        plane = plane[:, None]
    col = tl.arange(0, _pieces(PLAN, WIDE_ONES)[i][3] * STORED // BYTES)
    return plane + (unit_of(place, PLAN, t, c)[:, None] * (chunk_width(PLAN, t, c) * STORED // BYTES) + col[None, :])


@triton.jit
def wide_tile(page, place, valid, PLAN: tl.constexpr, WIDE: tl.constexpr):
    """16-bit tiers [TILE, columns]; rows that are not valid are 0, foreign bytes may be NaN."""
    parts = ()
    for i in tl.static_range(_num_pieces(PLAN, True)):
        x = tl.load(_piece_ptrs(page, place, PLAN, True, i, WIDE), mask=valid[:, None], other=0.0)
        parts = parts + (x,)
    return _tile_of(parts, PLAN, True)


@triton.jit
def code_tile(page, place, codes, PLAN: tl.constexpr):
    """Codes unpacked times their scales, [TILE, columns] fp16 in units of UNIT: finite, whatever the bytes."""
    parts = ()
    for i in tl.static_range(_num_pieces(PLAN, False)):
        parts = parts + (_unpacked_piece(page, place, codes[_pieces(PLAN, False)[i][0]], PLAN, i),)
    words = _in_rows(_tile_of(parts, PLAN, False), _whole(PLAN)[0], _whole(PLAN)[1])
    low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    return _alternating(low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True))


@triton.jit
def _unpacked_piece(page, place, scale_code, PLAN: tl.constexpr, i: tl.constexpr):
    t: tl.constexpr = _pieces(PLAN, False)[i][0]
    if _pieces(PLAN, False)[i][3] == 2:  # the last bytes of a row
        words = tl.load(_piece_ptrs(page, place, PLAN, False, i, tl.int16)).to(tl.int32)
    else:
        words = tl.load(_piece_ptrs(page, place, PLAN, False, i, tl.int32))
    return _unpacked(words, scale_code, middle(PLAN, t), tier_bits(PLAN, t))


@triton.jit
def _unpacked(words, scale_code, MIDDLE: tl.constexpr, NBITS: tl.constexpr):
    """int32 words [TILE, W] of codes times their tokens' scales: words [TILE, W * 16 / NBITS] of two fp16 each."""
    scale = (scale_of(scale_code.to(tl.int32)) * (1.0 / UNIT)).to(tl.float16)
    factor = tl.broadcast_to(_twice(scale)[:, None], words.shape)
    offset = tl.broadcast_to(_twice(scale * (-MIDDLE))[:, None], words.shape)
    if NBITS == 8:
        pairs = tl.join(*_words(words, factor, offset, 2, MIDDLE, NBITS))
    elif NBITS == 4:
        a, b, c, d = _words(words, factor, offset, 4, MIDDLE, NBITS)
        pairs = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        a, b, c, d, e, f, g, h = _words(words, factor, offset, 8, MIDDLE, NBITS)
        pairs = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    return tl.reshape(pairs, [words.shape[0], words.shape[1] * 16 // NBITS])


@triton.jit
def _twice(x):
    """fp16 in both halves of an int32."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def _words(words, factor, offset, COUNT: tl.constexpr, MIDDLE: tl.constexpr, NBITS: tl.constexpr):
    """Word k has the codes from bit k * NBITS and from bit k * NBITS + 16 on, times the scale."""
    if INTERPRETED:
        found = ()
        for k in tl.static_range(COUNT):
            low = _product(words >> (k * NBITS), factor, MIDDLE, NBITS)
            found = found + ((_product(words >> (k * NBITS + 16), factor, MIDDLE, NBITS) << 16) | low,)
        return found
    else:
        return tl.inline_asm_elementwise(
            _words_asm(NBITS),
            "=&r," * COUNT + "r,r,r",
            [words, factor, offset],
            dtype=(tl.int32,) * COUNT,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _product(word, factor, MIDDLE: tl.constexpr, NBITS: tl.constexpr):
    """Bits of the fp16 product of the lowest code of a word and the scale."""
    code = word & ((1 << NBITS) - 1)
    if NBITS == 8:
        code = (code ^ 0x80) - 128
    scale = (factor & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return ((code.to(tl.float32) - MIDDLE) * scale).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.constexpr_function
def _words_asm(nbits):
    """PTX of _words. A code in bits b .. of an fp16 whose exponent makes those count from 1 is 2**(10 - b) and the code; lop3 0x6a
    is (a & b) ^ c, which also turns the sign bit of 8-bit codes, whose zero is then 128."""
    count, per_byte = 16 // nbits, 8 // nbits
    word, factor, offset = (f"${count + i}" for i in range(3))
    lines = [".reg .b32 y, b;", f"shr.u32 y, {word}, 8;"]
    for k in range(count):
        shift = k % per_byte * nbits
        mask, magic = ((1 << nbits) - 1) << shift, (25 - shift) << 10
        bias = magic | 0x8000 | (128 if nbits == 8 else 0)
        flipped = magic | (0x80 if nbits == 8 else 0)
        source = word if k < per_byte else "y"
        last = f"mul.f16x2 ${k}, ${k}, {factor};" if nbits == 8 else f"fma.rn.f16x2 ${k}, ${k}, {factor}, {offset};"
        lines += [
            f"lop3.b32 ${k}, {source}, {mask * 0x10001:#x}, {flipped * 0x10001:#x}, 0x6a;",
            f"mov.b32 b, {bias * 0x10001:#x};",
            f"add.f16x2 ${k}, ${k}, b;",
            last,
        ]
    return "{ " + " ".join(lines) + " }"
