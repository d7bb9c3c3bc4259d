# SPDX-License-Identifier: Apache-2.0
"""Loose codes -> keys or values in head_dim, dequantised and expanded in one pass; of codes in pages: expand_cached.

In: codes and scales of one side. Out: x^ = D z + mu in the model's dtype. Meaning: reference.dequantize and expand. As in
decode, scales never touch elements: x^ = scale * (D codes - middle * D 1) + mu.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_dense, check_floats, next_power_of_2
from kvsplice_kernels.dispatch import dispatch
from kvsplice_kernels.packing import dot, load_decode, scale_of, to_float, unpack_part

BLOCK_M = 64


@triton.jit(do_not_specialize=["num_rows"])
def fused_expand_kernel(
    codes_ptr,  # [num_rows, num_heads, RANK * NBITS / 8] int8 or uint8
    scale_ptr,  # [num_rows, num_heads] uint8, reference.scale_of
    decode_ptr,  # [num_heads, HEAD_DIM, RANK] fp32
    mean_ptr,  # [num_heads, HEAD_DIM] fp32
    out_ptr,  # [num_rows, num_heads, HEAD_DIM] bf16, fp16 or fp32
    num_rows, stride_m, stride_h,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, NBITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = RANK * NBITS // 8
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_ok, d_ok = m < num_rows, d < HEAD_DIM
    decode_ptr += head * (HEAD_DIM * RANK)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ones = tl.zeros([BLOCK_D], tl.float32)  # D 1
    for start in range(0, ROW, BLOCK_R):
        col = start + tl.arange(0, BLOCK_R)
        ptrs = codes_ptr + (m * num_heads + head)[:, None] * ROW + col[None, :]
        raw = tl.load(ptrs, mask=m_ok[:, None] & (col < ROW)[None, :], other=0)
        for i in tl.static_range(8 // NBITS):
            weights = load_decode(decode_ptr, i * ROW + col, col < ROW, d, HEAD_DIM, RANK)
            acc = dot(unpack_part(raw.to(tl.uint8, bitcast=True), i, NBITS).to(tl.float32), weights, acc, PRECISION)
            ones += tl.sum(weights, 0)
    row = m * num_heads + head
    if NBITS < 8:
        acc -= ones[None, :] * (((1 << NBITS) - 1) / 2)
    acc *= scale_of(tl.load(scale_ptr + row, mask=m_ok, other=0).to(tl.int32))[:, None]
    acc += tl.load(mean_ptr + head * HEAD_DIM + d, mask=d_ok, other=0.0)[None, :]
    out_ptrs = out_ptr + (m * stride_m + head * stride_h)[:, None] + d[None, :]
    tl.store(out_ptrs, to_float(acc, out_ptr.dtype.element_ty), mask=m_ok[:, None] & d_ok[None, :])


def fused_expand_int8(codes: Tensor, scale: Tensor, decode: Tensor, mean: Tensor, out: Tensor) -> None:
    """out = scale * (D codes) + mean, for symmetric 8-bit codes.

    Args:
        codes: [M, H, rank] int8. scale: [M, H] uint8, see reference.scale_of. decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [M, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_dense("codes", codes, (*codes.shape[:2], decode.shape[-1]), torch.int8)
    _fused_expand(codes, scale, decode, mean, out, 8)


def fused_expand_int4(packed: Tensor, scale: Tensor, decode: Tensor, mean: Tensor, out: Tensor) -> None:
    """out = scale * (D (codes - 7.5)) + mean, for unsigned 4-bit codes packed by reference.pack.

    Args:
        packed: [M, H, rank / 2] uint8. scale: [M, H] uint8, see reference.scale_of. decode: [H, head_dim, rank], mean: [H, head_dim], fp32.
        out: [M, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_dense("packed", packed, (*packed.shape[:2], decode.shape[-1] // 2), torch.uint8)
    _fused_expand(packed, scale, decode, mean, out, 4)


def _fused_expand(codes: Tensor, scale: Tensor, decode: Tensor, mean: Tensor, out: Tensor, bits: int) -> None:
    M, H, row = codes.shape
    head_dim, rank = decode.shape[1:]
    check_dense("scale", scale, (M, H), torch.uint8)
    check_dense("decode", decode, (H, head_dim, rank))
    check_dense("mean", mean, (H, head_dim))
    check_floats("out", out, (M, H, head_dim))
    if M == 0:
        return
    block_d = min(128, max(16, next_power_of_2(head_dim)))
    dispatch(
        fused_expand_kernel, (-(-M // BLOCK_M), H, -(-head_dim // block_d)),
        codes, scale, decode, mean, out, M, out.stride(0), out.stride(1),
        HEAD_DIM=head_dim, RANK=rank, NBITS=bits, PRECISION=_precision(out),
        BLOCK_M=BLOCK_M, BLOCK_D=block_d, BLOCK_R=min(32, max(16, next_power_of_2(row))), num_warps=4, num_stages=2,
    )  # fmt: skip


def _precision(out: Tensor) -> str:
    """Codes are exact in tf32, so one pass loses only what D loses: less than rounding to bf16, not to fp16."""
    return "tf32" if out.dtype == torch.bfloat16 else "tf32x3"
