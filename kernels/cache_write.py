# SPDX-License-Identifier: Apache-2.0
"""New keys and values -> latents -> codes -> their slots in the paged cache. One launch for K and V of a layer.

In: the step's key and value, slot_mapping, the bases as encode.Prepared. Out: bytes in kv_cache, read next by decode.
Meaning: reference.encode, quantize, pack and write_side. Tiers are quantised each by itself, so a program takes one tier
of K or V of one head for some tokens: small steps spread over the GPU, and no program does another's work.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.checks import check_cache, check_dense, check_floats, wide_type
from kvsplice_kernels.dispatch import Binding, Bound, launcher
from kvsplice_kernels.encode import Prepared
from kvsplice_kernels.latents import NUM_WARPS, add_product, load_planes, load_rows, num_steps
from kvsplice_kernels.pdl import launch_dependents, pdl_options, wait
from kvsplice_kernels.plan import Plan, num_parts, num_tiers, rank_of
from kvsplice_kernels.quantize import (
    cut_pad,
    cuts_of,
    is_padded,
    num_cuts,
    own_columns,
    part_dims,
    store_tier,
    width_of,
)


@triton.jit
def _load_tier(
    planes_ptr, step: tl.constexpr,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tier's rows of both planes for one step: (high, low) of every chunk and part, flat."""
    planes = ()
    for c in tl.static_range(num_cuts(CUTS)):
        for i in tl.static_range(num_parts(PLAN, t)):
            dims, inside = part_dims(i, PLAN, t, CUTS, c), own_columns(CUTS, c)
            planes = planes + load_planes(planes_ptr, dims, inside, step, RANK, HEAD_DIM, BLOCK_D, is_padded(CUTS, c))
    return planes


@triton.jit
def _start(offset_ptr, PLAN: tl.constexpr, t: tl.constexpr, CUTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """-E mu of a tier as a tile for every chunk and part, zero in padding columns: what the product is added to."""
    z = ()
    for c in tl.static_range(num_cuts(CUTS)):
        for i in tl.static_range(num_parts(PLAN, t)):
            dims, inside = part_dims(i, PLAN, t, CUTS, c), own_columns(CUTS, c)
            offset = tl.load(offset_ptr + dims, mask=inside, other=0.0)
            z = z + (tl.broadcast_to(-offset[None, :], [BLOCK_T, cut_pad(CUTS, c)]),)
    return z


@triton.jit
def _add_step(z, x, planes, NUM: tl.constexpr):
    new = ()
    for p in tl.static_range(NUM):
        new = new + (add_product(z[p], x, planes[2 * p], planes[2 * p + 1]),)
    return new


@triton.jit
def write_tier(
    x_ptr, planes_ptr, offset_ptr, kv_cache_ptr, slot_mapping_ptr, num_tokens, stride_t, stride_h, stride_block,
    stride_head, tile, head, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr,
    PLAN: tl.constexpr, t: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The work of one program: BLOCK_T tokens of one tier of one head. Everything is loaded before anything is used."""
    CUTS: tl.constexpr = cuts_of(PLAN, t, BLOCK_T)
    TILES: tl.constexpr = num_cuts(CUTS) * num_parts(PLAN, t)
    planes_ptr += head * (2 * RANK * HEAD_DIM)
    planes = _load_tier(planes_ptr, 0, HEAD_DIM, RANK, PLAN, t, CUTS, BLOCK_D)
    z = _start(offset_ptr + head * RANK, PLAN, t, CUTS, BLOCK_T)
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    wait(PDL)
    x_ptrs = x_ptr + token.to(tl.int64) * stride_t + head * stride_h
    x = load_rows(x_ptrs, token < num_tokens, HEAD_DIM, BLOCK_D)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1)
    launch_dependents(PDL)
    z = _add_step(z, x[0], planes, TILES)
    for step in tl.static_range(1, num_steps(HEAD_DIM, BLOCK_D)):
        planes = _load_tier(planes_ptr, step, HEAD_DIM, RANK, PLAN, t, CUTS, BLOCK_D)
        z = _add_step(z, x[step], planes, TILES)
    kept = slot >= 0
    slot = tl.where(kept, slot, 0)
    page = kv_cache_ptr + (slot // BLOCK_SIZE) * stride_block + head.to(tl.int64) * stride_head  # slot is int64
    store_tier(z, page, (slot % BLOCK_SIZE).to(tl.int32), kept, PLAN, t, CUTS, WIDE)


@triton.jit
def write_job(
    key_ptr, value_ptr, kv_cache_ptr, slot_mapping_ptr, k_planes_ptr, k_offset_ptr, v_planes_ptr, v_offset_ptr,
    num_tokens, stride_key_t, stride_key_h, stride_value_t, stride_value_h, stride_block, stride_head, tile, head, job,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr, K_RANK: tl.constexpr, K_PLAN: tl.constexpr,
    V_RANK: tl.constexpr, V_PLAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """write_tier of the tier that ``job`` counts: those of K, then those of V."""
    for t in tl.static_range(num_tiers(K_PLAN)):
        if job == t:
            write_tier(
                key_ptr, k_planes_ptr, k_offset_ptr, kv_cache_ptr, slot_mapping_ptr, num_tokens, stride_key_t,
                stride_key_h, stride_block, stride_head, tile, head, HEAD_DIM, BLOCK_SIZE, WIDE, K_RANK, K_PLAN, t,
                BLOCK_T, BLOCK_D, PDL,
            )  # fmt: skip
    for t in tl.static_range(num_tiers(V_PLAN)):
        if job == num_tiers(K_PLAN) + t:
            write_tier(
                value_ptr, v_planes_ptr, v_offset_ptr, kv_cache_ptr, slot_mapping_ptr, num_tokens, stride_value_t,
                stride_value_h, stride_block, stride_head, tile, head, HEAD_DIM, BLOCK_SIZE, WIDE, V_RANK, V_PLAN, t,
                BLOCK_T, BLOCK_D, PDL,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def cache_write_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM] bf16, fp16 or fp32
    value_ptr,  # like key
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, C] uint8
    slot_mapping_ptr,  # [num_tokens] int64, block * BLOCK_SIZE + offset, or < 0
    k_planes_ptr,  # [num_kv_heads, 2, K_RANK, HEAD_DIM] bf16
    k_offset_ptr,  # [num_kv_heads, K_RANK] fp32
    v_planes_ptr, v_offset_ptr,
    num_tokens,
    stride_key_t, stride_key_h, stride_value_t, stride_value_h, stride_block, stride_head,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr,
    K_RANK: tl.constexpr, K_PLAN: tl.constexpr, V_RANK: tl.constexpr, V_PLAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    write_job(
        key_ptr, value_ptr, kv_cache_ptr, slot_mapping_ptr, k_planes_ptr, k_offset_ptr, v_planes_ptr, v_offset_ptr,
        num_tokens, stride_key_t, stride_key_h, stride_value_t, stride_value_h, stride_block, stride_head,
        tl.program_id(2), tl.program_id(1), tl.program_id(0), HEAD_DIM, BLOCK_SIZE, WIDE, K_RANK, K_PLAN, V_RANK,
        V_PLAN, BLOCK_T, BLOCK_D, PDL,
    )  # fmt: skip


class WriteTiles(NamedTuple):
    """How the write of a step is cut into programs."""

    block_t: int  # tokens of a program
    block_d: int
    tiles: int  # programs for each tier and head


def write_tiles(num_tokens: int, H: int, head_dim: int, plans: tuple[Plan, Plan]) -> WriteTiles:
    """Small tiles while they fill the GPU, then larger ones, which read the planes less often from L2.

    A program holds its rows and a step of its planes in shared memory: at most 96 KB, which every GPU since sm_80 has.
    """
    columns = H * sum(len(plan) for plan in plans)
    block_t = 16
    for larger, programs in ((32, 128), (64, 256), (128, 256)):
        if larger * head_dim <= 16384 and -(-num_tokens // larger) * columns >= programs:
            block_t = larger
    return WriteTiles(block_t, _block_d(block_t, head_dim, plans), -(-num_tokens // block_t))


@lru_cache(maxsize=256)
def _block_d(block_t: int, head_dim: int, plans: tuple[Plan, Plan]) -> int:
    widest = max(width_of(plan, t, block_t) for plan in plans for t in range(len(plan)))
    return min(max(16, triton.next_power_of_2(head_dim)), 16384 // triton.next_power_of_2(widest))


def check_write(
    key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, prepared: Prepared, k_plan: Plan, v_plan: Plan
) -> None:
    """Raise ValueError unless keys, values, slots, bases and pages fit each other."""
    H, head_dim = key.shape[1:]
    for name, x in (("key", key), ("value", value)):
        check_floats(name, x, (key.shape[0], H, head_dim))
    if slot_mapping.dtype != torch.int64 or slot_mapping.stride(0) != 1 or slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(
            f"slot_mapping: expected at most {key.shape[0]} contiguous int64, got {slot_mapping.shape[0]} of "
            f"{slot_mapping.dtype}"
        )
    check_cache(kv_cache, (k_plan, v_plan))
    if kv_cache.shape[1] != H:
        raise ValueError(f"kv_cache: expected {H} KV heads, got {kv_cache.shape[1]}")
    k_rank, v_rank = rank_of(k_plan), rank_of(v_plan)
    check_dense("k_encode", prepared.k_encode, (H, 2, k_rank, head_dim), torch.bfloat16)
    check_dense("k_offset", prepared.k_offset, (H, k_rank))
    check_dense("v_encode", prepared.v_encode, (H, 2, v_rank, head_dim), torch.bfloat16)
    check_dense("v_offset", prepared.v_offset, (H, v_rank))


def bind_write(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    prepared: Prepared,
    k_plan: Plan,
    v_plan: Plan,
    wide_dtype: torch.dtype = torch.bfloat16,
) -> Binding:
    """Encode, quantise and scatter the step's keys and values into ``kv_cache``, in place.

    Args:
        key, value: [>= T, H, head_dim], bfloat16, float16 or float32, any strides with a dense last axis.
        kv_cache: [num_blocks, H, block_size, C] uint8, outer strides free.
        slot_mapping: [T] int64; slot = block * block_size + offset, a negative one is skipped.
        prepared: of encode.prepare, for H heads.
        k_plan, v_plan: LatentLayout.plan("k" | "v", block_size). wide_dtype: of 16-bit tiers.
    Returns:
        The launch of tensors of these shapes and strides, and these, in the order that it takes.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    check_write(key, value, kv_cache, slot_mapping, prepared, k_plan, v_plan)
    num_tokens, (H, head_dim) = slot_mapping.shape[0], key.shape[1:]
    cut = write_tiles(num_tokens, H, head_dim, (k_plan, v_plan))
    bound = Bound(
        cache_write_kernel, (len(k_plan) + len(v_plan), H, cut.tiles), num_tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), kv_cache.stride(0), kv_cache.stride(1),
        HEAD_DIM=head_dim, BLOCK_SIZE=kv_cache.shape[2], WIDE=wide_type(wide_dtype),
        K_RANK=rank_of(k_plan), K_PLAN=k_plan, V_RANK=rank_of(v_plan), V_PLAN=v_plan,
        BLOCK_T=cut.block_t, BLOCK_D=cut.block_d, num_warps=4 if cut.block_t == 64 and head_dim <= 128 else NUM_WARPS, num_stages=1, **pdl_options(key.device),
    )  # fmt: skip
    return bound, (key, value, kv_cache, slot_mapping, *prepared[:4])


cache_write = launcher(bind_write)
