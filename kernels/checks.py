# SPDX-License-Identifier: Apache-2.0
"""What every launcher checks by name before a launch: shapes, dtypes, and that a cache is a cache of bytes."""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from kvsplice_kernels.plan import Plan

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def check_floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has this shape, a float dtype that kernels read, and a dense last axis."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected bfloat16, float16 or float32, got {tensor.dtype}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name}: expected a contiguous last axis, got strides {tensor.stride()}")


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless both tensors pass check_floats, with one dtype and one another's strides."""
    check_floats(name, tensor, shape)
    check_floats(other_name, other, shape)
    if other.dtype != tensor.dtype:
        raise ValueError(f"{other_name}: expected {tensor.dtype}, got {other.dtype}")
    if other.stride() != tensor.stride():
        raise ValueError(f"{other_name}: expected the strides {tensor.stride()}, got {other.stride()}")


def check_dense(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError unless ``tensor`` is contiguous, of exactly this shape and dtype."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )


def check_cache(kv_cache: Tensor, plans: tuple[Plan, ...]) -> None:
    """Raise ValueError unless ``kv_cache`` [num_blocks, H, block_size, C] is uint8 pages that hold ``plans``."""
    if kv_cache.dtype != torch.uint8 or kv_cache.dim() != 4:
        raise ValueError(f"kv_cache: expected uint8 with 4 axes, got {kv_cache.dtype} {tuple(kv_cache.shape)}")
    (_, _, block_size, cell), strides = kv_cache.shape, kv_cache.stride()
    if strides[2:] != (cell, 1):
        raise ValueError(f"kv_cache: expected contiguous (block_size, C) pages, got strides {strides}")
    if strides[0] % 4 or strides[1] % 4 or kv_cache.data_ptr() % 4:
        raise ValueError(f"kv_cache: pages must start on multiples of 4 bytes, got strides {strides}")
    _check_pages(block_size, cell, plans)


@lru_cache(maxsize=256)
def _check_pages(block_size: int, cell: int, plans: tuple[Plan, ...]) -> None:
    if block_size % 16:
        raise NotImplementedError(f"kv_cache: block size {block_size} is not a multiple of 16")
    for plan in plans:
        for bits, dims, _, codes, scale, tokens, _ in plan:
            if tokens != block_size:
                raise ValueError(f"plan: made for blocks of {tokens} tokens, got a cache with {block_size}")
            end = max(codes + block_size * dims * bits // 8, scale + block_size)
            if end > block_size * cell:
                raise ValueError(f"plan: a {bits}-bit tier ends at byte {end} of a page of {block_size * cell} bytes")


def wide_type(wide_dtype: torch.dtype) -> tl.dtype:
    """The Triton type of 16-bit tiers; raises ValueError for a dtype that has not 16 bits."""
    if wide_dtype not in WIDE:
        raise ValueError(f"wide_dtype: expected bfloat16 or float16, got {wide_dtype}")
    return WIDE[wide_dtype]


def next_power_of_2(n: int) -> int:
    """Of n >= 1, as Triton's, which takes the host some microseconds for each call."""
    return 1 << (n - 1).bit_length()
