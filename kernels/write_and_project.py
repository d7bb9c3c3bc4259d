# SPDX-License-Identifier: Apache-2.0
"""A decode step's first launch of a layer: cache_write of its keys and values and project_query of its queries, in one.

In: the step's query, key, value and slot_mapping, the bases as encode.Prepared. Out: bytes in kv_cache, q_latent and
q_bias, all read next by decode. The programs of both run side by side: neither fills a GPU in a decode step, and each
launch costs as much as the work in it. Nothing is allocated and nothing waits for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.cache_write import check_write, write_job, write_tiles
from kvsplice_kernels.checks import wide_type
from kvsplice_kernels.dispatch import Binding, Bound, launcher
from kvsplice_kernels.encode import Prepared
from kvsplice_kernels.latents import NUM_WARPS
from kvsplice_kernels.pdl import pdl_options
from kvsplice_kernels.plan import Plan, num_tiers, rank_of
from kvsplice_kernels.project_query import check_query, project_tile, query_tiles


@triton.jit(do_not_specialize=["num_tokens", "num_queries", "num_writes"])
def write_and_project_kernel(
    query_ptr,  # [num_queries, H * GROUP, HEAD_DIM] bf16, fp16 or fp32
    key_ptr,  # [num_tokens, H, HEAD_DIM]
    value_ptr,  # like key
    kv_cache_ptr,  # [num_blocks, H, BLOCK_SIZE, C] uint8
    slot_mapping_ptr,  # [num_tokens] int64, block * BLOCK_SIZE + offset, or < 0
    k_planes_ptr,  # [H, 2, K_RANK, HEAD_DIM] bf16
    k_offset_ptr,  # [H, K_RANK] fp32
    v_planes_ptr,
    v_offset_ptr,
    q_planes_ptr,  # [H, 2, Q_RANK, HEAD_DIM] bf16
    k_mean_ptr,  # [H, HEAD_DIM] fp32
    q_latent_ptr,  # [num_queries, H * GROUP, Q_RANK] fp32
    q_bias_ptr,  # [num_queries, H * GROUP] fp32
    num_tokens, num_queries, num_writes,
    stride_query_t, stride_query_h, stride_key_t, stride_key_h, stride_value_t, stride_value_h,
    stride_block, stride_head,
    H: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr,
    K_RANK: tl.constexpr, K_PLAN: tl.constexpr, V_RANK: tl.constexpr, V_PLAN: tl.constexpr,
    BLOCK_T: tl.constexpr, WRITE_BLOCK_D: tl.constexpr,
    Q_RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr, QUERY_BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < num_writes:
        JOBS: tl.constexpr = num_tiers(K_PLAN) + num_tiers(V_PLAN)
        write_job(
            key_ptr, value_ptr, kv_cache_ptr, slot_mapping_ptr, k_planes_ptr, k_offset_ptr, v_planes_ptr, v_offset_ptr,
            num_tokens, stride_key_t, stride_key_h, stride_value_t, stride_value_h, stride_block, stride_head,
            program // (JOBS * H), program // JOBS % H, program % JOBS, HEAD_DIM, BLOCK_SIZE, WIDE,
            K_RANK, K_PLAN, V_RANK, V_PLAN, BLOCK_T, WRITE_BLOCK_D, PDL,
        )  # fmt: skip
    else:
        program -= num_writes
        project_tile(
            query_ptr, q_planes_ptr, k_mean_ptr, q_latent_ptr, q_bias_ptr, num_queries, stride_query_t, stride_query_h,
            program // (COLUMNS * H), program % COLUMNS, program // COLUMNS % H,
            H, GROUP, HEAD_DIM, Q_RANK, BLOCK_M, BLOCK_R, QUERY_BLOCK_D, PDL,
        )  # fmt: skip


def step_sizes(most: int, num_heads: int, H: int, head_dim: int, k_plan: Plan, v_plan: Plan) -> list[int]:
    """Token counts up to ``most``, one for each variant of these kernels that Triton compiles: what a warm-up must run.

    They cover write_and_project with as many tokens as queries, and cache_write and project_query by themselves.
    """
    first: dict[tuple[int, ...], int] = {}
    for tokens in range(1, most + 1):
        write = write_tiles(tokens, H, head_dim, (k_plan, v_plan))
        project = query_tiles(tokens, num_heads // H, head_dim, rank_of(k_plan))
        first.setdefault((write.block_t, project.block_m, project.block_r), tokens)
    return list(first.values())


def bind_write_and_project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    prepared: Prepared,
    k_plan: Plan,
    v_plan: Plan,
    q_latent: Tensor,
    q_bias: Tensor,
    wide_dtype: torch.dtype = torch.bfloat16,
    rows: bool = False,
) -> Binding:
    """``cache_write`` and ``project_query`` in one launch.

    Args:
        query: [T, num_heads, head_dim], bfloat16, float16 or float32, any strides with a dense last axis; query head h
            reads KV head h // (num_heads // H).
        key, value: [>= S, H, head_dim], likewise. kv_cache: [num_blocks, H, block_size, C] uint8, outer strides free.
        slot_mapping: [S] int64; slot = block * block_size + offset, a negative one is skipped. S and T are independent.
        prepared: of encode.prepare, for H heads, and of row_operands.in_columns where ``rows``.
        k_plan, v_plan: LatentLayout.plan("k" | "v", block_size). wide_dtype: of 16-bit tiers.
        q_latent: [T, num_heads, k_rank] fp32; q_bias: [T, num_heads] fp32.
        rows: for a launch with queries as rows, where q_latent has the columns of prepared.k_columns.
    Returns:
        The launch of tensors of these shapes and strides, and these, in the order that it takes.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_write(key, value, kv_cache, slot_mapping, prepared, k_plan, v_plan)
    bases = prepared.of_a_step(rows)
    check_query(query, *bases[4:], q_latent, q_bias)
    num_tokens, (H, head_dim) = slot_mapping.shape[0], key.shape[1:]
    num_queries, group, q_rank = query.shape[0], query.shape[1] // H, q_latent.shape[2]
    write = write_tiles(num_tokens, H, head_dim, (k_plan, v_plan))
    project = query_tiles(num_queries, group, head_dim, q_rank)
    num_writes = (len(k_plan) + len(v_plan)) * H * write.tiles
    programs = num_writes + project.columns * H * project.tiles
    bound = Bound(
        write_and_project_kernel, (programs,), num_tokens, num_queries, num_writes,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv_cache.stride(0), kv_cache.stride(1),
        H=H, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=kv_cache.shape[2], WIDE=wide_type(wide_dtype),
        K_RANK=rank_of(k_plan), K_PLAN=k_plan, V_RANK=rank_of(v_plan), V_PLAN=v_plan,
        BLOCK_T=write.block_t, WRITE_BLOCK_D=write.block_d,
        Q_RANK=q_rank, BLOCK_M=project.block_m, BLOCK_R=project.block_r, COLUMNS=project.columns, QUERY_BLOCK_D=project.block_d,
        num_warps=NUM_WARPS, num_stages=1, **pdl_options(key.device, early=not rows),
    )  # fmt: skip
    return bound, (query, key, value, kv_cache, slot_mapping, *bases, q_latent, q_bias)


write_and_project = launcher(bind_write_and_project)
