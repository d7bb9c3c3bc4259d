# SPDX-License-Identifier: Apache-2.0
"""Codes of a tile of tokens as operands of tensor-core dots, for decode: keys as int8, values as fp16, tokens first.

In come tier plans and page pointers; out go operands, one for each part of a byte or word of a chunk. A chunk of keys is
bytes, whose codes become int8 by one mask each; a chunk of values is 16-bit words: ``ldmatrix.trans``, which turns
token-major values into the operand of sum_t p_t z_t, moves 16-bit words. A dot contracts at least 32 bytes of keys and has
at least 16 rows of values: narrower chunks of keys are repeated, and the repeats meet zeros of the query; chunks of 8 words of
values come two tokens to an operand, whose halves of the result are told apart in the end.
"""

import triton
import triton.language as tl

from kvsplice_kernels.packing import INTERPRETED
from kvsplice_kernels.plan import (
    chunk_col,
    chunk_paired,
    chunk_width,
    num_chunks,
    num_tiers,
    scale_offset,
    tier_bits,
)

SUB = tl.constexpr(16)  # tokens that lie in one page whatever the block size, a multiple of it


# ---------------------------------------------------------------- how a chunk becomes operands
@triton.constexpr_function
def _row(plan, t):
    bits, dims = plan[t][:2]
    return dims if bits == 16 else dims * bits // 8


@triton.constexpr_function
def key_parts(plan, t):
    """Operands of a chunk of keys: codes of a byte, or 1 at 16 bits."""
    return max(1, 8 // plan[t][0])


@triton.constexpr_function
def key_depth(plan, t, c):
    """Contraction of a key operand's dot."""
    return max(16 if plan[t][0] == 16 else 32, chunk_width(plan, t, c))


@triton.constexpr_function
def key_first(plan, t, c, i):
    """First latent dimension of operand i of a chunk of keys; as many follow as the chunk is wide."""
    return plan[t][2] + i * _row(plan, t) + chunk_col(plan, t, c)


@triton.constexpr_function
def key_index(plan, t, c):
    """Index of a chunk's first key operand among all of a side."""
    return sum(num_chunks(plan, u) * key_parts(plan, u) for u in range(t)) + c * key_parts(plan, t)


@triton.constexpr_function
def query_index(plan, t, c):
    """Index of a chunk's first query operand: each key operand has two, high and low, or one at 16 bits."""
    each = [key_parts(plan, u) * (1 if plan[u][0] == 16 else 2) for u in range(t + 1)]
    return sum(num_chunks(plan, u) * each[u] for u in range(t)) + c * each[t]


@triton.constexpr_function
def word_width(plan, t, c):
    """16-bit words of a chunk of values."""
    return chunk_width(plan, t, c) // (1 if plan[t][0] == 16 else 2)


@triton.constexpr_function
def value_parts(plan, t):
    """Operands of a chunk of values: codes of a word."""
    return 16 // plan[t][0]


@triton.constexpr_function
def value_rows(plan, t, c):
    """Rows of a value operand."""
    return max(16, word_width(plan, t, c))


@triton.constexpr_function
def value_index(plan, t, c):
    """Index of a chunk's first accumulator among all of a side: one for each part, or two where tokens come in pairs."""
    before = [(u, k) for u in range(t + 1) for k in range(num_chunks(plan, u) if u < t else c)]
    return sum(value_parts(plan, u) * (2 if chunk_paired(plan, u, k) else 1) for u, k in before)


@triton.constexpr_function
def num_accumulators(plan):
    """Tiles of 16 rows in which a side's values are added up."""
    chunks = [(t, c) for t in range(num_tiers(plan)) for c in range(num_chunks(plan, t))]
    return sum(
        value_parts(plan, t) * (2 if chunk_paired(plan, t, c) else 1) * (value_rows(plan, t, c) // 16)
        for t, c in chunks
    )


@triton.constexpr_function
def value_first(plan, t, c, i):
    """Latent dimension of operand i's first row; rows are 2 dimensions apart (1 at 16 bits): a word is two bytes."""
    if plan[t][0] == 16:
        return plan[t][2] + chunk_col(plan, t, c)
    in_byte = 8 // plan[t][0]
    return plan[t][2] + i % in_byte * _row(plan, t) + chunk_col(plan, t, c) + i // in_byte


@triton.constexpr_function
def value_factor(plan, t, i):
    """What operand i comes out multiplied by, see unpack_word: its place within the byte, and fp16's least step."""
    bits = plan[t][0]
    return 1.0 if bits >= 8 else float(1 << (i % (8 // bits) * bits)) * 2.0**-24


# ---------------------------------------------------------------- loads
# Codes are loaded without masks and gaps, 16 tokens of a chunk in one stretch: an asynchronous copy with masked lanes, or of
# rows that lie apart in shared memory, takes several times as long (docs/results/profile-decode-h200.json).
@triton.jit
def pages_of(pages, token):
    """Page pointers of tokens [TILE] of a tile: the one that all lie in, or each sub-tile's own."""
    if len(pages) == 1:
        return pages[0]
    else:
        page = tl.broadcast_to(pages[0], token.shape)
        for s in tl.static_range(1, len(pages)):
            page = tl.where(token >= s * SUB, pages[s], page)
        return page


@triton.jit
def _chunk_ptrs(page, row, col, START: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers [rows, cols], or [cols, rows], into a chunk's plane that starts START bytes into the page."""
    plane = (page + START).to(tl.pointer_type(TYPE))
    if TRANSPOSED:
        offsets = row[None, :] * WIDTH + col[:, None]
        return plane + offsets if len(page.shape) == 0 else plane[None, :] + offsets
    else:
        offsets = row[:, None] * WIDTH + col[None, :]
        return plane + offsets if len(page.shape) == 0 else plane[:, None] + offsets


@triton.constexpr_function
def _chunk_start(plan, t, c):
    """Byte in the page where chunk c of tier t starts."""
    bits, _, _, codes, _, block_size, _ = plan[t]
    return codes + block_size * chunk_col(plan, t, c) * (2 if bits == 16 else 1)


@triton.jit
def load_keys(page, row, valid, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr, WIDE: tl.constexpr):
    """A chunk of the tokens ``row`` of their pages, raw: [TILE, depth] int8, or floats at 16 bits (0 where not ``valid``)."""
    WIDTH: tl.constexpr = chunk_width(PLAN, t, c)
    if tier_bits(PLAN, t) == 16:
        col = tl.arange(0, key_depth(PLAN, t, c))
        ptrs = _chunk_ptrs(page, row, col, _chunk_start(PLAN, t, c), WIDTH, WIDE, False)
        return tl.load(ptrs, mask=valid[:, None] & (col < WIDTH)[None, :], other=0.0)
    else:
        raw = tl.load(_chunk_ptrs(page, row, tl.arange(0, WIDTH), _chunk_start(PLAN, t, c), WIDTH, tl.int8, False))
        return repeated(raw, key_depth(PLAN, t, c) // WIDTH)


@triton.jit
def load_values(page, row, valid, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr, WIDE: tl.constexpr):
    """A chunk of the tokens ``row``, transposed: [rows, TILE] int16 words, or floats at 16 bits (0 where not ``valid``)."""
    WIDTH: tl.constexpr = word_width(PLAN, t, c)
    col = tl.arange(0, value_rows(PLAN, t, c))
    if tier_bits(PLAN, t) == 16:
        ptrs = _chunk_ptrs(page, row, col, _chunk_start(PLAN, t, c), WIDTH, WIDE, True)
        return tl.load(ptrs, mask=valid[None, :] & (col < WIDTH)[:, None], other=0.0)
    else:
        ptrs = _chunk_ptrs(page, row, col, _chunk_start(PLAN, t, c), WIDTH, tl.int16, True)
        if value_rows(PLAN, t, c) == WIDTH:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(col < WIDTH)[:, None], other=0)


@triton.jit
def load_value_pairs(page, row, PLAN: tl.constexpr, t: tl.constexpr, c: tl.constexpr):
    """A chunk that holds tokens in pairs, transposed: [16, TILE / 2] int16, the 8 words of one token above those of the
    token 8 further on. page and row are of the first tokens."""
    pair = row // 16 * 8 + row % 8
    return tl.load(_chunk_ptrs(page, pair, tl.arange(0, 16), _chunk_start(PLAN, t, c), 16, tl.int16, True))


@triton.jit
def halves(weights):
    """[TILE, N] -> the first and the last 8 tokens of each 16, [TILE / 2, N] each; in registers."""
    T: tl.constexpr = weights.shape[0]
    N: tl.constexpr = weights.shape[1]
    first, second = tl.split(tl.permute(tl.reshape(weights, [T // 16, 2, 8, N]), (0, 2, 3, 1)))
    return tl.reshape(first, [T // 2, N]), tl.reshape(second, [T // 2, N])


@triton.jit
def folded(first, second):
    """Accumulators [16, N] of both halves -> [8, N]: the upper words of the first and the lower ones of the second."""
    N: tl.constexpr = first.shape[1]
    upper, _ = tl.split(tl.permute(tl.reshape(first, [2, 8, N]), (1, 2, 0)))
    _, lower = tl.split(tl.permute(tl.reshape(second, [2, 8, N]), (1, 2, 0)))
    return upper + lower


@triton.jit
def repeated(raw, TIMES: tl.constexpr):
    """A tile [n, m] several times side by side: nothing but a layout, the same registers under several names."""
    if TIMES == 1:
        return raw
    else:
        wide = tl.broadcast_to(raw[:, None, :], [raw.shape[0], TIMES, raw.shape[1]])
        return tl.reshape(wide, [raw.shape[0], TIMES * raw.shape[1]])


@triton.jit
def load_scales(page, row, PLAN: tl.constexpr):
    """Scale bytes of every tier's tokens ``row`` as int32 [TILE]. As words of 4 bytes, which four tokens share, even these are
    copied ahead asynchronously."""
    codes = ()
    for t in tl.static_range(num_tiers(PLAN)):
        if tier_bits(PLAN, t) == 16:
            codes = codes + (0,)
        else:
            words = tl.load((page + scale_offset(PLAN, t)).to(tl.pointer_type(tl.int32)) + (row >> 2))
            codes = codes + (_byte(words, row & 3),)
    return codes


@triton.jit
def _byte(words, i):
    """Byte i (0 .. 3) of int32 words."""
    if INTERPRETED:
        return (words >> (i * 8)) & 0xFF
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [words, i | 0x4440], dtype=tl.int32, is_pure=True, pack=1
        )


# ---------------------------------------------------------------- unpacking
@triton.jit
def key_codes(raw, i: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr):
    """Operand i of a raw chunk [TILE, depth]: floats at 16 bits, else int8 codes."""
    if tier_bits(PLAN, t) >= 8:
        return raw
    else:
        return key_part(raw, i, tier_bits(PLAN, t))


@triton.jit
def key_part(raw, i: tl.constexpr, NBITS: tl.constexpr):
    """Part i of int8 bytes, four bytes at a time."""
    if INTERPRETED:
        return ((raw.to(tl.uint8, bitcast=True) >> (i * NBITS)) & ((1 << NBITS) - 1)).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(key_asm(i, NBITS), "=r,r", [raw], dtype=tl.int8, is_pure=True, pack=4)


@triton.constexpr_function
def key_asm(i, nbits):
    """PTX of key_part; bits that a shift brings over from the next byte are masked off."""
    mask = f"{((1 << nbits) - 1) * 0x01010101:#x}"
    if i == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; shr.u32 t, $1, {i * nbits}; and.b32 $0, t, {mask}; }}"


@triton.jit
def value_codes(raw, i: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr):
    """Operand i of raw words [rows, TILE]: floats at 16 bits, else fp16 codes times value_factor."""
    if tier_bits(PLAN, t) == 16:
        return raw
    else:
        return unpack_word(raw, i, tier_bits(PLAN, t))


@triton.jit
def unpack_word(raw, i: tl.constexpr, NBITS: tl.constexpr):
    """Part i of int16 words as exact fp16, times a constant of the part.

    An fp16 with no exponent bits is subnormal: its mantissa times 2**-24. Tensor cores take those as they are, so a
    code of 4 or 2 bits is masked in place and nothing else. Signed bytes: 0x6400 | n is 1024 + n, and 1152 is taken off.
    """
    IN_BYTE: tl.constexpr = 8 // NBITS
    if INTERPRETED:
        byte = (raw >> (8 * (i // IN_BYTE))) & 0xFF
        if NBITS == 8:
            return ((byte ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        else:
            return (byte & (((1 << NBITS) - 1) << (i % IN_BYTE * NBITS))).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(word_asm(i, NBITS), "=r,r", [raw], dtype=tl.float16, is_pure=True, pack=2)


@triton.constexpr_function
def word_asm(i, nbits):
    """PTX of unpack_word for two words; lop3 0x6a is (a & b) ^ c."""
    in_byte = 8 // nbits
    shift = f"shr.u32 t, $1, {8 * (i // in_byte)};" if i >= in_byte else "mov.b32 t, $1;"
    if nbits == 8:
        bias = "mov.b32 b, 0xe480e480; add.f16x2 $0, t, b;"  # -1152 twice
        return f"{{ .reg .b32 t, b; {shift} lop3.b32 t, t, 0x00ff00ff, 0x64806480, 0x6a; {bias} }}"
    mask = (((1 << nbits) - 1) << (i % in_byte * nbits)) * 0x00010001
    return f"{{ .reg .b32 t; {shift} and.b32 $0, t, {mask:#010x}; }}"
