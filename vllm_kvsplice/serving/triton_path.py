# SPDX-License-Identifier: Apache-2.0
"""The write and read paths on a GPU: hands vLLM's tensors to the kernels. No sync, no allocation but vLLM's workspace.

Same three functions as torch_path, and the reservation of scratch and the warm-up that a server wants before it starts.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from kvsplice_kernels.attention import Workspace, choose_num_splits, paged_attention, workspace_shapes
from kvsplice_kernels.cache_write import cache_write
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec
from vllm_kvsplice.serving.metadata import Prefills, Requests
from vllm_kvsplice.serving.vllm_compat import flash_attention, workspace

LONG_STEP = 1024  # tokens: past the sizes at which the launchers change their tiles
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def write(codec: LayerCodec, bases: Bases, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Encode keys and values [>= T, H, head_dim] into the slots of ``slot_mapping`` [T]; -1 is skipped."""
    cache_write(
        key,
        value,
        kv_cache,
        slot_mapping,
        bases.k_encode,
        bases.k_mean,
        bases.v_encode,
        bases.v_mean,
        codec.layout.plan("k", kv_cache.shape[2]),
        codec.layout.plan("v", kv_cache.shape[2]),
        codec.wide_dtype,
    )


def decode(codec: LayerCodec, bases: Bases, query: Tensor, kv_cache: Tensor, requests: Requests, out: Tensor) -> None:
    """Attend to codes: query [T, num_heads, head_dim] of ``requests`` -> ``out`` [T, num_heads, head_dim].

    The split count depends on host numbers that are fixed when a CUDA graph is captured.
    """
    splits = choose_num_splits(
        requests.num_reqs, codec.num_kv_heads, requests.max_seq_len, _multiprocessors(query.device)
    )
    _attend_codes(codec, bases, query, kv_cache, requests, out, splits, skip_first_chunks=False)


def prefill(
    codec: LayerCodec,
    bases: Bases,
    query: Tensor,
    fresh: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    requests: Prefills,
    out: Tensor,
) -> None:
    """Like ``decode``, but first chunks attend to ``fresh``, their own key and value [T, H, head_dim], where given.

    Where both kinds are in a step, FlashAttention runs over all rows and the others are then written over: one launch
    each, and rows of continued requests are few.
    """
    first = fresh is not None and any(requests.first_chunk)
    if fresh is not None and first:
        fresh_attention(codec, query, *fresh, requests, out)
    if not (first and all(requests.first_chunk)):
        # As an upper bound: with the true one every short tail of a prompt would be a kernel variant of its own.
        longest = max(requests.max_query_len, LONG_STEP)
        _attend_codes(codec, bases, query, kv_cache, requests, out, 1, skip_first_chunks=first, max_query_len=longest)


def fresh_attention(
    codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor, requests: Requests, out: Tensor
) -> None:
    """Causal FlashAttention of each request over its own new keys and values."""
    flash_attn_varlen_func, version = _flash_attention(codec.layout.head_dim, codec.soft_cap)
    flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=requests.query_start_loc,
        cu_seqlens_k=requests.query_start_loc,
        max_seqlen_q=requests.max_query_len,
        max_seqlen_k=requests.max_query_len,
        softmax_scale=codec.scale,
        causal=True,
        window_size=[codec.sliding_window - 1, 0] if codec.sliding_window else [-1, -1],
        softcap=codec.soft_cap or 0.0,
        fa_version=version,
    )


def reserve(
    codec: LayerCodec, max_num_seqs: int, decode_query_len: int, max_tokens: int, max_seq_len: int, device: torch.device
) -> None:
    """Let vLLM's workspace grow now to the most that any step will ask for; it is locked once graphs are captured."""
    wanted = [_shapes(codec, max_tokens, 1)]
    for num_reqs in range(1, max_num_seqs + 1):
        splits = choose_num_splits(num_reqs, codec.num_kv_heads, max_seq_len, _multiprocessors(device))
        wanted.append(_shapes(codec, min(num_reqs * decode_query_len, max_tokens), splits))
    workspace(*max(wanted, key=lambda shapes: sum(-(-prod(shape) * 4 // 256) for shape, _ in shapes)))


def warm_up(
    codec: LayerCodec, block_size: int, dtype: torch.dtype, device: torch.device, decode_query_len: int, max_tokens: int
) -> None:
    """Compile every kernel for short and long steps now, rather than during the first requests; nothing is computed."""
    D, cell = codec.layout.head_dim, codec.bytes_per_token_head
    cache = torch.zeros(1, codec.num_kv_heads, block_size, cell, dtype=torch.uint8, device=device)
    bases = _blank_bases(codec, device)
    table, lens = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    starts = torch.zeros(2, dtype=torch.int32, device=device)
    for tokens in sorted({1, min(LONG_STEP, max_tokens)}):
        query, key = (
            torch.zeros(tokens, n, D, dtype=dtype, device=device) for n in (codec.num_heads, codec.num_kv_heads)
        )
        write(codec, bases, key, key, cache, torch.full((tokens,), -1, dtype=torch.int64, device=device))
        for query_len, skip in ((decode_query_len, False), (LONG_STEP, False), (LONG_STEP, True)):
            empty = Requests(1, 0, query_len, query_len, starts, lens, table)
            _attend_codes(codec, bases, query, cache, empty, torch.empty_like(query), 1, skip)


def _blank_bases(codec: LayerCodec, device: torch.device) -> Bases:
    H, D = codec.num_kv_heads, codec.layout.head_dim
    ranks = codec.layout.rank("k"), codec.layout.rank("v")
    shapes = [shape for rank in ranks for shape in ((H, rank, D), (H, D, rank), (H, D))]
    return Bases(*(torch.zeros(shape, device=device, dtype=torch.float32) for shape in shapes))


def _attend_codes(
    codec: LayerCodec,
    bases: Bases,
    query: Tensor,
    kv_cache: Tensor,
    requests: Requests,
    out: Tensor,
    num_splits: int,
    skip_first_chunks: bool,
    max_query_len: int | None = None,
) -> None:
    paged_attention(
        query,
        kv_cache,
        codec.layout.plan("k", kv_cache.shape[2]),
        codec.layout.plan("v", kv_cache.shape[2]),
        bases.k_decode,
        bases.k_mean,
        bases.v_decode,
        bases.v_mean,
        requests.block_table,
        requests.seq_lens,
        requests.query_start_loc,
        codec.scale,
        out,
        max_query_len or requests.max_query_len,
        num_splits,
        codec.sliding_window,
        codec.soft_cap,
        codec.wide_dtype,
        skip_first_chunks,
        Workspace(*workspace(*_shapes(codec, query.shape[0], num_splits))),
    )


def _shapes(codec: LayerCodec, num_tokens: int, num_splits: int) -> Shapes:
    ranks = codec.layout.rank("k"), codec.layout.rank("v")
    return tuple((s, torch.float32) for s in workspace_shapes(num_tokens, codec.num_heads, *ranks, num_splits))


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_flash_attention = lru_cache(maxsize=8)(flash_attention)
