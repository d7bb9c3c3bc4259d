# SPDX-License-Identifier: Apache-2.0
"""Queries -> the latent space of K: q_latent = D^T q and q_bias = q.mu, so that q.k^ = q_latent.z + q_bias.

In: the step's query and K's basis as encode.Prepared holds it. Out: what decode reads. Meaning: reference.project_query.
A program takes some rows (token, query head of a KV head) and some latent dimensions. In a decode step
write_and_project does this beside the write, in one launch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_dense, check_floats, next_power_of_2
from kvsplice_kernels.dispatch import Binding, Bound, launcher
from kvsplice_kernels.latents import NUM_WARPS, add_product, load_planes, load_rows, num_steps
from kvsplice_kernels.pdl import launch_dependents, pdl_options, wait


@triton.jit
def _add_bias(bias, x, mean_ptr, step: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = step * BLOCK_D + tl.arange(0, BLOCK_D)
    mean = tl.load(mean_ptr + d, mask=d < HEAD_DIM, other=0.0)
    return bias + tl.sum(x.to(tl.float32) * mean[None, :], 1)


@triton.jit
def project_tile(
    query_ptr, planes_ptr, mean_ptr, q_latent_ptr, q_bias_ptr, num_tokens, stride_t, stride_h, tile, column, kv_head,
    H: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The work of one program: BLOCK_M rows of a KV head's queries, BLOCK_R latent dimensions."""
    r = column * BLOCK_R + tl.arange(0, BLOCK_R)
    r_ok = r < RANK
    planes_ptr += kv_head * (2 * RANK * HEAD_DIM)
    mean_ptr += kv_head * HEAD_DIM
    masked: tl.constexpr = RANK % BLOCK_R != 0
    high, low = load_planes(planes_ptr, r, r_ok, 0, RANK, HEAD_DIM, BLOCK_D, masked)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = (m // GROUP).to(tl.int64), kv_head * GROUP + m % GROUP
    ok = token < num_tokens
    wait(PDL)
    x = load_rows(query_ptr + token * stride_t + head * stride_h, ok, HEAD_DIM, BLOCK_D)
    launch_dependents(PDL)
    latent = add_product(tl.zeros([BLOCK_M, BLOCK_R], tl.float32), x[0], high, low)
    for step in tl.static_range(1, num_steps(HEAD_DIM, BLOCK_D)):
        high, low = load_planes(planes_ptr, r, r_ok, step, RANK, HEAD_DIM, BLOCK_D, masked)
        latent = add_product(latent, x[step], high, low)
    row = token * (H * GROUP) + head
    tl.store(q_latent_ptr + row[:, None] * RANK + r[None, :], latent, mask=ok[:, None] & r_ok[None, :])
    if column == 0:
        bias = tl.zeros([BLOCK_M], tl.float32)
        for step in tl.static_range(num_steps(HEAD_DIM, BLOCK_D)):
            bias = _add_bias(bias, x[step], mean_ptr, step, HEAD_DIM, BLOCK_D)
        tl.store(q_bias_ptr + row, bias, mask=ok)


@triton.jit(do_not_specialize=["num_tokens"])
def project_query_kernel(
    query_ptr,  # [num_tokens, H * GROUP, HEAD_DIM] bf16, fp16 or fp32
    planes_ptr,  # [H, 2, RANK, HEAD_DIM] bf16
    mean_ptr,  # [H, HEAD_DIM] fp32
    q_latent_ptr,  # [num_tokens, H * GROUP, RANK] fp32
    q_bias_ptr,  # [num_tokens, H * GROUP] fp32
    num_tokens, stride_t, stride_h,
    H: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    project_tile(
        query_ptr, planes_ptr, mean_ptr, q_latent_ptr, q_bias_ptr, num_tokens, stride_t, stride_h,
        tl.program_id(2), tl.program_id(0), tl.program_id(1),
        H, GROUP, HEAD_DIM, RANK, BLOCK_M, BLOCK_R, BLOCK_D, PDL,
    )  # fmt: skip


class QueryTiles(NamedTuple):
    """How the projection of a step is cut into programs."""

    block_m: int  # rows of a program
    block_r: int  # latent dimensions of a program
    block_d: int
    columns: int  # programs side by side
    tiles: int  # programs one below the other, for each KV head


def query_tiles(num_tokens: int, group: int, head_dim: int, rank: int) -> QueryTiles:
    """Small tiles for few rows, to fill the GPU; then larger ones, to read the planes less often from L2."""
    rows = num_tokens * group
    block_m = 16 if rows <= 64 else 64 if rows <= 1024 else 128
    block_r = 32 if rows <= 512 else 64
    block_d = min(128, max(16, next_power_of_2(head_dim)))
    return QueryTiles(block_m, block_r, block_d, -(-rank // block_r), -(-rows // block_m))


def check_query(query: Tensor, k_decode: Tensor, k_mean: Tensor, q_latent: Tensor, q_bias: Tensor) -> None:
    """Raise ValueError unless queries, K's basis and the outputs fit each other."""
    T, num_heads, head_dim = query.shape
    H, rank = k_decode.shape[0], k_decode.shape[2]
    check_floats("query", query, (T, num_heads, head_dim))
    check_dense("k_decode", k_decode, (H, 2, rank, head_dim), torch.bfloat16)
    check_dense("k_mean", k_mean, (H, head_dim))
    check_dense("q_latent", q_latent, (T, num_heads, rank))
    check_dense("q_bias", q_bias, (T, num_heads))
    if num_heads % H:
        raise ValueError(f"query: expected a multiple of {H} heads, got {num_heads}")


def bind_project(
    query: Tensor, k_decode: Tensor, k_mean: Tensor, q_latent: Tensor, q_bias: Tensor, early: bool = True
) -> Binding:
    """Rotate queries into the latent space of K, writing into ``q_latent`` and ``q_bias``.

    Args:
        query: [T, num_heads, head_dim], bfloat16, float16 or float32, any strides with a dense last axis; query head h
            reads KV head h // (num_heads // H).
        k_decode: [H, 2, rank, head_dim] bf16, k_mean: [H, head_dim] fp32, of encode.Prepared.
        q_latent: [T, num_heads, rank] fp32; q_bias: [T, num_heads] fp32.
        early: whether decode may start while this runs, see pdl_options.
    Returns:
        The launch of tensors of these shapes and strides, and these, in the order that it takes.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_query(query, k_decode, k_mean, q_latent, q_bias)
    T, num_heads, head_dim = query.shape
    H, _, rank, _ = k_decode.shape
    tiles = query_tiles(T, num_heads // H, head_dim, rank)
    bound = Bound(
        project_query_kernel, (tiles.columns, H, tiles.tiles), T, query.stride(0), query.stride(1),
        H=H, GROUP=num_heads // H, HEAD_DIM=head_dim, RANK=rank,
        BLOCK_M=tiles.block_m, BLOCK_R=tiles.block_r, BLOCK_D=tiles.block_d,
        num_warps=NUM_WARPS, num_stages=1, **pdl_options(query.device, early),
    )  # fmt: skip
    return bound, (query, k_decode, k_mean, q_latent, q_bias)


project_query = launcher(bind_project)
