# SPDX-License-Identifier: Apache-2.0
"""Queries -> the latent space of K: q_latent = D^T q and q_bias = q.mu, so that q.k^ = q_latent.z + q_bias.

In: the step's query and K's basis. Out: what decode reads. Meaning: reference.project_query.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_dense, check_floats
from kvsplice_kernels.packing import dot


@triton.jit(do_not_specialize=["num_tokens"])
def project_query_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM] bf16, fp16 or fp32
    k_decode_ptr,  # [num_kv_heads, HEAD_DIM, RANK] fp32
    k_mean_ptr,  # [num_kv_heads, HEAD_DIM] fp32
    q_latent_ptr,  # [num_tokens, num_heads, RANK] fp32
    q_bias_ptr,  # [num_tokens, num_heads] fp32
    num_tokens, stride_t, stride_h,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = (m // GROUP).to(tl.int64), kv_head * GROUP + m % GROUP
    ok = token < num_tokens
    r = tl.arange(0, RANK_PAD)
    r_ok = r < RANK
    latent = tl.zeros([BLOCK_M, RANK_PAD], tl.float32)
    bias = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < HEAD_DIM
        q_ptrs = query_ptr + (token * stride_t + head * stride_h)[:, None] + d[None, :]
        q = tl.load(q_ptrs, mask=ok[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
        decode_ptrs = k_decode_ptr + (kv_head * HEAD_DIM + d)[:, None] * RANK + r[None, :]
        latent = dot(q, tl.load(decode_ptrs, mask=d_ok[:, None] & r_ok[None, :], other=0.0), latent, "tf32x3")
        mean = tl.load(k_mean_ptr + kv_head * HEAD_DIM + d, mask=d_ok, other=0.0)
        bias += tl.sum(q * mean[None, :], 1)
    row = token * (tl.num_programs(1) * GROUP) + head
    tl.store(q_latent_ptr + row[:, None] * RANK + r[None, :], latent, mask=ok[:, None] & r_ok[None, :])
    tl.store(q_bias_ptr + row, bias, mask=ok)


def project_query(query: Tensor, k_decode: Tensor, k_mean: Tensor, q_latent: Tensor, q_bias: Tensor) -> None:
    """Rotate queries into the latent space of K, writing into ``q_latent`` and ``q_bias``.

    Args:
        query: [T, num_heads, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
        k_decode: [H, head_dim, rank] fp32; k_mean: [H, head_dim] fp32; query head h reads KV head h // (num_heads // H).
        q_latent: [T, num_heads, rank] fp32; q_bias: [T, num_heads] fp32.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    T, num_heads, head_dim = query.shape
    H, _, rank = k_decode.shape
    check_floats("query", query, (T, num_heads, head_dim))
    check_dense("k_decode", k_decode, (H, head_dim, rank))
    check_dense("k_mean", k_mean, (H, head_dim))
    check_dense("q_latent", q_latent, (T, num_heads, rank))
    check_dense("q_bias", q_bias, (T, num_heads))
    if num_heads % H:
        raise ValueError(f"query: expected a multiple of {H} heads, got {num_heads}")
    if T == 0:
        return
    group = num_heads // H
    block_m = 16 if T * group <= 512 else 64
    project_query_kernel[(triton.cdiv(T * group, block_m), H)](
        query, k_decode, k_mean, q_latent, q_bias, T, query.stride(0), query.stride(1),
        GROUP=group, HEAD_DIM=head_dim, RANK=rank, RANK_PAD=max(16, triton.next_power_of_2(rank)),
        BLOCK_M=block_m, BLOCK_D=16 if rank > 128 else 32, num_warps=block_m // 16, num_stages=2,
    )  # fmt: skip
