# SPDX-License-Identifier: Apache-2.0
"""Activations times a split matrix: the jit helpers that cache_write and project_query share.

In: rows of keys, values or queries and planes of encode.Prepared. Out: fp32 tiles of latents. A bf16 row times two bf16
planes is two tensor-core products; a row of another type is itself split in two, and costs three.
"""

import triton
import triton.language as tl

from kvsplice_kernels.packing import INTERPRETED, dot, to_float

NUM_WARPS = 8  # of writing and of projecting programs, which share a launch in decode steps


@triton.constexpr_function
def num_steps(head_dim, block_d):
    """Steps of BLOCK_D that cover a head."""
    return -(-head_dim // block_d)


@triton.jit
def load_planes(
    planes_ptr, dims, dims_ok, step: tl.constexpr,
    RANK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(high, low), each [BLOCK_D, dims], of one head's planes [2, RANK, HEAD_DIM]; MASKED: where dims_ok may be false."""
    d = step * BLOCK_D + tl.arange(0, BLOCK_D)
    ptrs = planes_ptr + dims[None, :] * HEAD_DIM + d[:, None]
    if MASKED or HEAD_DIM % BLOCK_D != 0:
        mask = dims_ok[None, :] & (d < HEAD_DIM)[:, None]
        return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + RANK * HEAD_DIM, mask=mask, other=0.0)
    else:
        return tl.load(ptrs), tl.load(ptrs + RANK * HEAD_DIM)


@triton.jit
def load_rows(x_ptrs, rows_ok, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [rows, HEAD_DIM] at pointers [rows] as a tuple of tiles [rows, BLOCK_D], one for each step."""
    x = ()
    for step in tl.static_range(num_steps(HEAD_DIM, BLOCK_D)):
        d = step * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = rows_ok[:, None]
        if HEAD_DIM % BLOCK_D != 0:
            mask = mask & (d < HEAD_DIM)[None, :]
        x = x + (tl.load(x_ptrs[:, None] + d[None, :], mask=mask, other=0.0),)
    return x


@triton.jit
def add_product(acc, x, high, low):
    """acc + x @ (high + low) in fp32: x [rows, BLOCK_D], planes [BLOCK_D, dims]."""
    if x.dtype == tl.bfloat16:
        acc = dot(x, low, acc, "ieee")
        return dot(x, high, acc, "ieee")
    else:
        wide = x.to(tl.float32)
        x_high = to_float(wide, tl.bfloat16)
        x_low = to_float(wide - x_high.to(tl.float32), tl.bfloat16)
        acc = dot(x_low, high, acc, "ieee")
        acc = dot(x_high, low, acc, "ieee")
        return dot(x_high, high, acc, "ieee")


@triton.jit
def divide(a, B: tl.constexpr):
    """a / B, correctly rounded, of normal fp32 numbers and without a branch: one step of Newton's method on a * (1 / B)."""
    if INTERPRETED:  # whose fma rounds twice
        return tl.div_rn(a, tl.full(a.shape, B, tl.float32))
    else:
        inverse = tl.full(a.shape, 1.0 / B, tl.float32)
        quotient = a * inverse
        return tl.fma(tl.fma(-quotient, tl.full(a.shape, B, tl.float32), a), inverse, quotient)


@triton.jit
def fast_reciprocal(x):
    """1 / x to the last bit or two, infinite at zero."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x of a scale, to the last bit or the one before."""
    guess = fast_reciprocal(x)
    if not INTERPRETED:  # where the division is exact, and fma is not
        guess = tl.fma(tl.fma(-x, guess, tl.full(x.shape, 1.0, tl.float32)), guess, guess)
    return guess
