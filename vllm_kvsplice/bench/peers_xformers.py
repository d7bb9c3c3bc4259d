# SPDX-License-Identifier: Apache-2.0
"""xformers' split-K decoding over int4 keys and values in pages, where xformers is installed (written against 0.0.35).

In: a cache size. Out: an ``OpenCache``. A row of the cache is int32: one word of two fp16 numbers (scale, shift), then
eight 4-bit codes a word, lowest bits first (xformers/ops/fmha/triton_splitk.py). xformers has no writer; filling is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from vllm_kvsplice.bench.kernels_data import Batch, OpenCache, Shape

TOLERANCE = 0.3  # of 4-bit keys and values over normal numbers


def split_k(preset: str, shape: Shape, num_blocks: int, device: str) -> OpenCache:
    """The "int4" cache, one scale and shift per token and head."""
    import_module("xformers.ops.fmha.triton_splitk")
    dims = num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim // 8 + 1
    keys, values = (torch.zeros(dims, dtype=torch.int32, device=device) for _ in range(2))

    def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
        block, row = slots // shape.block_size, slots % shape.block_size
        keys[block, row], values[block, row] = quantize(key), quantize(value)

    def attention(batch: Batch, at: Shape) -> Callable[[Tensor], None]:
        return _attention(batch, at, keys, values)

    return OpenCache((keys, values), write, write, attention, TOLERANCE)


def quantize(x: Tensor) -> Tensor:
    """[T, H, head_dim] -> [T, H, head_dim // 8 + 1] int32 rows."""
    x = x.float()
    shift, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, shift = ((top - shift) / 15).half(), shift.half()
    codes = ((x - shift.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
    numbers = torch.cat([scale, shift], dim=-1).view(torch.uint8)
    return torch.cat([numbers, codes[..., ::2] | (codes[..., 1::2] << 4)], dim=-1).view(torch.int32)


def _attention(batch: Batch, at: Shape, keys: Tensor, values: Tensor) -> Callable[[Tensor], None]:
    fmha = import_module("xformers.ops.fmha")
    bias, split = import_module("xformers.ops.fmha.attn_bias"), import_module("xformers.ops.fmha.triton_splitk")
    group = at.num_heads // at.num_kv_heads
    query = batch.query.view(1, at.batch, at.num_kv_heads, group, at.head_dim)
    # An expanded head axis is how the kernel knows that the query heads of a group share keys.
    k, v = (x.view(1, -1, at.num_kv_heads, 1, x.shape[-1]).expand(-1, -1, -1, group, -1) for x in (keys, values))
    lens = bias.BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * at.batch,
        kv_padding=at.blocks_per_request * at.block_size,
        kv_seqlen=[at.context] * at.batch,
        device=batch.query.device,
    )

    def attend(table: Tensor) -> None:
        pages = lens.make_paged(table, at.block_size, bias.PagedBlockDiagonalPaddedKeysMask)
        out = fmha.memory_efficient_attention_forward(query, k, v, pages, scale=at.scale, op=split.FwOp)
        batch.out.copy_(out.view_as(batch.out))

    return attend
