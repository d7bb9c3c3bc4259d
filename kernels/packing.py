# SPDX-License-Identifier: Apache-2.0
"""Codes in a page: arithmetic and places that cache_write, decode, expand_cached and fused_expand share.

In come tier plans (plain tuples of integers) and page pointers; out go pointers, and codes as exact fp16 tiles. The meaning is
reference.unpack and dequantize. Rounding and packing are in quantize, the operands of decode in operands.
"""

import triton
import triton.language as tl

from kvsplice_kernels.plan import (
    block_size_of,
    chunk_col,
    chunk_pad,
    chunk_paired,
    chunk_width,
    codes_offset,
    num_chunks,
    num_tiers,
    scale_offset,
    tier_bits,
    tier_row,
    tier_start,
)

LEAST_EXPONENT = tl.constexpr(-18)  # reference.LEAST_EXPONENT

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---------------------------------------------------------------- arithmetic
@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with fp32 accumulation; PRECISION matters for fp32 operands only."""
    if INTERPRETED:  # the interpreter multiplies raw bf16 bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def to_float(x, TYPE: tl.constexpr):
    """fp32 -> TYPE, to nearest even."""
    if INTERPRETED and tl.bfloat16 == TYPE:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def floor_power_of_two(x):
    """The largest power of two <= x, fp32, held within 2**-40 .. 2**100 so that its inverse is normal too."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 87 << 23), 227 << 23)
    return exponent.to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(x):
    """1 / x, exact, for x a power of two from floor_power_of_two."""
    return ((254 << 23) - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # -2 log2(e)
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


# ---------------------------------------------------------------- codes
@triton.jit
def scale_of(code):
    """fp32 scales of scale bytes in int32, reference.scale_of: never zero, infinite or NaN."""
    return ((code << 20) + ((127 + LEAST_EXPONENT) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def scale_code(scale):
    """Scale byte in int32 of the least scale that is not below fp32 ``scale``, reference.scale_code."""
    code = ((scale.to(tl.int32, bitcast=True) + 0xFFFFF) >> 20) - ((127 + LEAST_EXPONENT) << 3)
    return tl.minimum(tl.maximum(code, 0), 255)


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, of |x| < 2**22: adding 1.5 * 2**23 leaves fp32 no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def unpack_part(raw, i: tl.constexpr, NBITS: tl.constexpr):
    """Part i of uint8 bytes -> exact fp16 codes. 0x6400 | n is the fp16 number 1024 + n: no slow int-to-float."""
    if INTERPRETED:
        word = raw.to(tl.int16)
        if NBITS == 8:
            return ((word ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        else:
            return (((word >> (i * NBITS)) & ((1 << NBITS) - 1)) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        return tl.inline_asm_elementwise(unpack_asm(i, NBITS), "=r,=r,r", [raw], dtype=tl.float16, is_pure=True, pack=4)


@triton.constexpr_function
def unpack_asm(i, nbits):
    """PTX of unpack_part for four bytes at a time."""
    if nbits == 8:
        pick, bias = "xor.b32 t, $2, 0x80808080;", "0xe480e480"  # -1152 twice
    else:
        mask = ((1 << nbits) - 1) * 0x01010101
        pick, bias = f"shr.u32 t, $2, {i * nbits}; and.b32 t, t, {mask:#x};", "0xe400e400"  # -1024 twice
    return (
        "{ .reg .b32 t, h, b; mov.b32 h, 0x64646464; mov.b32 b, " + bias + "; " + pick + " "
        "prmt.b32 $0, t, h, 0x4140; prmt.b32 $1, t, h, 0x4342; add.f16x2 $0, $0, b; add.f16x2 $1, $1, b; }"
    )


@triton.jit
def operand(raw, i: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr):
    """Part i of a loaded chunk as a dot operand: the model's float at 16 bits, else fp16 codes."""
    if tier_bits(PLAN, t) == 16:
        return raw
    else:
        return unpack_part(raw, i, tier_bits(PLAN, t))


@triton.jit
def own_columns(PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr):
    """Columns [PAD] of a chunk that are not padding."""
    return tl.arange(0, chunk_pad(PLAN, t, c)) < chunk_width(PLAN, t, c)


@triton.jit
def part_dims(i: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr):
    """Latent dimensions [PAD] of part i of a chunk; those from WIDTH on belong to others."""
    return tier_start(PLAN, t) + i * tier_row(PLAN, t) + chunk_col(PLAN, t, c) + tl.arange(0, chunk_pad(PLAN, t, c))


@triton.jit
def load_decode(decode_ptr, dims, dims_ok, d, HEAD_DIM: tl.constexpr, RANK: tl.constexpr):
    """Rows ``dims`` of D^T: [dims, BLOCK_D] fp32, 0 outside."""
    mask = dims_ok[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(decode_ptr + d[None, :] * RANK + dims[:, None], mask=mask, other=0.0)


# ---------------------------------------------------------------- places in a page
@triton.jit
def load_block(table_ptr, tile, first, end, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block id of a tile, or of each of its tokens if pages are smaller; 0 where no token of [first, end) needs one."""
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table_ptr + tile * TILE // BLOCK_SIZE, mask=tile * TILE < end, other=0)
    else:
        position = tile * TILE + tl.arange(0, TILE)
        return tl.load(table_ptr + position // BLOCK_SIZE, mask=(position >= first) & (position < end), other=0)


@triton.jit
def page_of(cache_ptr, block, stride_block):
    return cache_ptr + block.to(tl.int64) * stride_block  # block * stride passes 2**31 on a large cache


@triton.jit
def code_ptrs(page, row, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to a chunk [rows, PAD]; page: one uint8 pointer, or one for each row."""
    plane = page + codes_offset(PLAN, t)
    if tier_bits(PLAN, t) == 16:
        plane = plane.to(tl.pointer_type(WIDE))
    plane += block_size_of(PLAN, t) * chunk_col(PLAN, t, c)
    if len(page.shape) == 1:
        plane = plane[:, None]
    col = tl.arange(0, chunk_pad(PLAN, t, c))
    return plane + (unit_of(row, PLAN, t, c)[:, None] * chunk_width(PLAN, t, c) + col[None, :])


@triton.jit
def unit_of(row, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr):
    """Place of a block's tokens ``row`` in a chunk's plane: layout.unit_of, or the token itself."""
    if chunk_paired(PLAN, t, c):
        return row // 16 * 16 + row % 8 * 2 + row % 16 // 8
    else:
        return row


@triton.jit
def code_offsets(row, col, PLAN: tl.constexpr, t: tl.constexpr):
    """Elements from the start of a tier's codes to columns ``col`` of its row of tokens ``row``, whatever their chunks."""
    offsets = unit_of(row, PLAN, t, 0) * chunk_width(PLAN, t, 0) + col
    for c in tl.static_range(1, num_chunks(PLAN, t)):
        first = chunk_col(PLAN, t, c)
        here = block_size_of(PLAN, t) * first + unit_of(row, PLAN, t, c) * chunk_width(PLAN, t, c) + (col - first)
        offsets = tl.where(col >= first, here, offsets)
    return offsets


@triton.jit
def load_codes(page, row, valid, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr, WIDE: tl.constexpr):
    """Raw chunk of tokens ``row`` of a page. Foreign bytes in rows that are not valid come out finite, never as NaN."""
    ptrs = code_ptrs(page, row, PLAN, t, c, WIDE)
    inside = own_columns(PLAN, t, c)
    if tier_bits(PLAN, t) == 16:
        return tl.load(ptrs, mask=inside[None, :] & valid[:, None], other=0.0)
    elif chunk_pad(PLAN, t, c) == chunk_width(PLAN, t, c):
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=inside[None, :], other=0)


@triton.jit
def scale_ptrs(page, row, PLAN: tl.constexpr, t: tl.constexpr):
    """Pointers [rows] to scale bytes."""
    return page + (scale_offset(PLAN, t) + row)


@triton.jit
def load_scales(page, row, PLAN: tl.constexpr):
    """fp32 scales [rows] of every tier; 0 where a tier has none."""
    scales = ()
    codes = load_scale_bytes(page, row, PLAN)
    for t in tl.static_range(num_tiers(PLAN)):
        scales = scales + (0 if tier_bits(PLAN, t) == 16 else scale_of(codes[t].to(tl.int32)),)
    return scales


@triton.jit
def load_scale_bytes(page, row, PLAN: tl.constexpr):
    """Scale bytes [rows] of every tier; 0 where a tier has none."""
    codes = ()
    for t in tl.static_range(num_tiers(PLAN)):
        codes = codes + (0 if tier_bits(PLAN, t) == 16 else tl.load(scale_ptrs(page, row, PLAN, t)),)
    return codes
