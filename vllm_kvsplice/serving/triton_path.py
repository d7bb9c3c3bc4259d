# SPDX-License-Identifier: Apache-2.0
"""The write and read paths on a GPU: hands vLLM's tensors to the kernels. No sync, no allocation but vLLM's workspace.

Same three functions as torch_path, and the reservation of scratch and the warm-up that a server wants before it starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvsplice_kernels.attention import Workspace, choose_num_splits, paged_attention, workspace_shapes
from kvsplice_kernels.cache_write import cache_write, write_tiles
from kvsplice_kernels.encode import Prepared, prepare
from kvsplice_kernels.project_query import query_tiles
from kvsplice_kernels.reduce_expand import reduce_tiles
from kvsplice_kernels.write_and_project import step_sizes, write_and_project
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.serving import cached_prefill, fallback_attention
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, Limits, bases_of, prepared_of
from vllm_kvsplice.serving.metadata import Prefills, Requests
from vllm_kvsplice.serving.refusals import FLASH_HEAD_DIM
from vllm_kvsplice.serving.vllm_compat import flash_attention, workspace

LONG_STEP = 1024  # tokens: past the sizes at which the launchers change their tiles
WARM_UP_THREADS = 8
Step = Callable[[], None]
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
Written = tuple[Tensor, Tensor, Tensor]  # key and value [>= T, H, head_dim], slot_mapping [T]


class Tensors(NamedTuple):
    """A layer's projector, in fp32 and as the kernels want it."""

    bases: Bases
    prepared: Prepared


def tensors_of(layer: Any) -> Tensors:
    """What the functions below need of a layer's projector, read from it each time."""
    return Tensors(bases_of(layer), prepared_of(layer))


def write(
    codec: LayerCodec, tensors: Tensors, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Encode keys and values [>= T, H, head_dim] into the slots of ``slot_mapping`` [T]; -1 is skipped."""
    plans = _plans(codec, kv_cache)
    cache_write(key, value, kv_cache, slot_mapping, tensors.prepared, *plans, codec.wide_dtype)


def decode(
    codec: LayerCodec,
    tensors: Tensors,
    query: Tensor,
    written: Written | None,
    kv_cache: Tensor,
    requests: Requests,
    out: Tensor,
) -> None:
    """Attend to codes: query [T, num_heads, head_dim] of ``requests`` -> ``out`` [T, num_heads, head_dim].

    ``written``: the step's keys and values, stored in the launch that projects the queries; None if they are already.
    The split count depends on host numbers that are fixed when a CUDA graph is captured.
    """
    splits = choose_num_splits(
        requests.num_reqs, codec.num_kv_heads, requests.max_seq_len, _multiprocessors(query.device)
    )
    work = Workspace(*workspace(*_shapes(codec, query.shape[0], splits)))
    if written is not None:
        plans, latent = _plans(codec, kv_cache), (work.q_latent, work.q_bias)
        key, value, slots = written
        write_and_project(query, key, value, kv_cache, slots, tensors.prepared, *plans, *latent, codec.wide_dtype)
    _attend_codes(
        codec, tensors, query, kv_cache, requests, out, splits, False, work=work, projected=written is not None
    )


def prefill(
    codec: LayerCodec,
    tensors: Tensors,
    query: Tensor,
    fresh: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    requests: Prefills,
    out: Tensor,
) -> None:
    """Like ``decode``, but first chunks attend to ``fresh``, their own key and value [T, H, head_dim], where given.

    The others attend through FlashAttention over expanded codes, in one go with first chunks, or through the latent
    kernel where that is cheaper or FlashAttention is missing: see cached_prefill.
    """
    first = fresh is not None and any(requests.first_chunk)
    if fresh is not None and all(requests.first_chunk):
        fresh_attention(codec, query, *fresh, requests, out)
        return
    flash = _flash_attention(codec.layout.head_dim, codec.soft_cap)
    pieces = cached_prefill.plan(codec, requests, fresh is not None, query.device) if flash else None
    if flash and pieces is not None:
        cached_prefill.attend(codec, tensors.bases, query, fresh, kv_cache, requests, out, pieces, flash)
        return
    if fresh is not None and first:  # over all rows; those of continued requests are written over
        fresh_attention(codec, query, *fresh, requests, out)
    # As an upper bound: with the true one every short tail of a prompt would be a kernel variant of its own.
    longest = max(requests.max_query_len, LONG_STEP)
    _attend_codes(codec, tensors, query, kv_cache, requests, out, 1, skip_first_chunks=first, max_query_len=longest)


def fresh_attention(
    codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor, requests: Prefills, out: Tensor
) -> None:
    """Causal FlashAttention of each request over its own new keys and values."""
    flash = _flash_attention(codec.layout.head_dim, codec.soft_cap)
    if flash is None:
        fallback_attention.attend_first_chunks(codec, query, key, value, requests, out)
        return
    flash_attn_varlen_func, version = flash
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
    expands = _flash_attention(codec.layout.head_dim, codec.soft_cap) and codec.layout.head_dim <= FLASH_HEAD_DIM
    wanted = [_shapes(codec, _most_latent_tokens(codec, max_tokens), 1)]
    if expands:
        limits = Limits(max_num_seqs, max_tokens, max_seq_len)
        wanted.append(cached_prefill.scratch_shapes(codec, limits, codec.wide_dtype))
    for num_reqs in range(1, max_num_seqs + 1):
        splits = choose_num_splits(num_reqs, codec.num_kv_heads, max_seq_len, _multiprocessors(device))
        wanted.append(_shapes(codec, min(num_reqs * decode_query_len, max_tokens), splits))
    workspace(*max(wanted, key=lambda shapes: sum(-(-prod(s) * d.itemsize // 256) for s, d in shapes)))


def warm_up(
    codec: LayerCodec, block_size: int, dtype: torch.dtype, device: torch.device, decode_query_len: int, limits: Limits
) -> None:
    """Compile every kernel for every kind of step now, rather than during the first requests; nothing is computed."""
    D, cell, most = codec.layout.head_dim, codec.bytes_per_token_head, limits.max_num_batched_tokens
    cache = torch.zeros(1, codec.num_kv_heads, block_size, cell, dtype=torch.uint8, device=device)
    bases = _blank_bases(codec, device)
    tensors = Tensors(bases, prepare(*bases))
    steps: list[Step] = []
    if _flash_attention(D, codec.soft_cap) and D <= FLASH_HEAD_DIM:
        steps.append(partial(cached_prefill.warm_up, codec, bases, cache, dtype))

    def rows(tokens: int) -> tuple[Tensor, Written]:
        query, key = (
            torch.zeros(tokens, n, D, dtype=dtype, device=device) for n in (codec.num_heads, codec.num_kv_heads)
        )
        return query, (key, key, torch.full((tokens,), -1, dtype=torch.int64, device=device))

    def long_step(tokens: int) -> None:
        query, (key, value, slots) = rows(tokens)
        write(codec, tensors, key, value, cache, slots)
        for skip in (False, True) if tokens <= _most_latent_tokens(codec, most) else ():
            empty = _empty_requests(1, LONG_STEP, LONG_STEP, device)
            _attend_codes(codec, tensors, query, cache, empty, torch.empty_like(query), 1, skip)

    def decode_step(num_reqs: int, query_len: int, max_seq_len: int) -> None:
        query, written = rows(num_reqs * query_len)
        empty = _empty_requests(num_reqs, query_len, max_seq_len, device)
        decode(codec, tensors, query, written, cache, empty, torch.empty_like(query))

    sizes = step_sizes(most, codec.num_heads, codec.num_kv_heads, D, *_plans(codec, cache))
    steps += [partial(long_step, tokens) for tokens in sizes]
    steps += [partial(decode_step, *s) for s in decode_steps(codec, block_size, decode_query_len, limits, device)]
    _run_together(steps, device)


def _run_together(steps: list[Step], device: torch.device) -> None:
    """Side by side on a GPU: most of a compilation holds no lock of Python's."""
    if device.type != "cuda":
        for step in steps:
            step()
        return

    def run(step: Step) -> None:
        with torch.cuda.device(device):
            step()

    with ThreadPoolExecutor(min(WARM_UP_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(run, steps))
    torch.cuda.synchronize(device)


def decode_steps(
    codec: LayerCodec, block_size: int, decode_query_len: int, limits: Limits, device: torch.device
) -> list[tuple[int, int, int]]:
    """(requests, query tokens of each, longest sequence) of few decode steps that meet every variant of every kernel."""
    group, layout = codec.num_heads // codec.num_kv_heads, codec.layout
    plans = _plans_of(layout, block_size)
    rank_pad = max(16, 1 << (layout.rank("v") - 1).bit_length())
    lengths = [limits.max_model_len >> i for i in range(limits.max_model_len.bit_length())]
    query_lens = sorted({min(1 << i, decode_query_len) for i in range(decode_query_len.bit_length() + 1)})
    seen: set[object] = set()
    found: list[tuple[int, int, int]] = []
    for query_len, num_reqs in product(query_lens, range(1, limits.max_num_seqs + 1)):
        tokens = num_reqs * query_len
        if tokens > max(limits.max_num_batched_tokens, query_len):
            break
        project = query_tiles(tokens, group, layout.head_dim, layout.rank("k"))
        block_t = write_tiles(tokens, codec.num_kv_heads, layout.head_dim, plans).block_t
        for length in lengths:
            splits = choose_num_splits(num_reqs, codec.num_kv_heads, length, _multiprocessors(device))
            tiles = reduce_tiles(tokens * codec.num_heads, group, query_len, layout.head_dim, rank_pad, splits)
            write = "write", block_t, project.block_m, project.block_r
            reduce = "reduce", query_len == 1, query_len <= tiles.tile_tokens, (splits - 1).bit_length(), tiles
            variants = {write, ("decode", query_len), reduce}
            if not variants <= seen:
                seen |= variants
                found.append((num_reqs, query_len, length))
    return found


def _empty_requests(num_reqs: int, max_query_len: int, max_seq_len: int, device: torch.device) -> Requests:
    """Requests without tokens: kernels that are given them are compiled, and do nothing."""
    starts, lens = (torch.zeros(num_reqs + n, dtype=torch.int32, device=device) for n in (1, 0))
    table = torch.zeros(num_reqs, 1, dtype=torch.int32, device=device)
    return Requests(num_reqs, 0, max_query_len, max_seq_len, starts, lens, table)


def _most_latent_tokens(codec: LayerCodec, max_tokens: int) -> int:
    """Prefill tokens of a step that the latent kernel may be given."""
    expands = _flash_attention(codec.layout.head_dim, codec.soft_cap) and codec.layout.head_dim <= FLASH_HEAD_DIM
    return min(max_tokens, cached_prefill.LATENT_TOKENS) if expands else max_tokens


def _plans(codec: LayerCodec, kv_cache: Tensor) -> tuple[Any, Any]:
    return _plans_of(codec.layout, kv_cache.shape[2])


@lru_cache(maxsize=256)
def _plans_of(layout: LatentLayout, block_size: int) -> tuple[Any, Any]:
    """Cached: every layer asks for them in every step that no CUDA graph replays."""
    return layout.plan("k", block_size), layout.plan("v", block_size)


def _blank_bases(codec: LayerCodec, device: torch.device) -> Bases:
    H, D = codec.num_kv_heads, codec.layout.head_dim
    ranks = codec.layout.rank("k"), codec.layout.rank("v")
    shapes = [shape for rank in ranks for shape in ((H, rank, D), (H, D, rank), (H, D))]
    return Bases(*(torch.zeros(shape, device=device, dtype=torch.float32) for shape in shapes))


def _attend_codes(
    codec: LayerCodec,
    tensors: Tensors,
    query: Tensor,
    kv_cache: Tensor,
    requests: Requests,
    out: Tensor,
    num_splits: int,
    skip_first_chunks: bool,
    max_query_len: int | None = None,
    work: Workspace | None = None,
    projected: bool = False,
) -> None:
    paged_attention(
        query,
        kv_cache,
        *_plans(codec, kv_cache),
        tensors.prepared,
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
        work or Workspace(*workspace(*_shapes(codec, query.shape[0], num_splits))),
        projected,
    )


def _shapes(codec: LayerCodec, num_tokens: int, num_splits: int) -> Shapes:
    ranks = codec.layout.rank("k"), codec.layout.rank("v")
    return tuple((s, torch.float32) for s in workspace_shapes(num_tokens, codec.num_heads, *ranks, num_splits))


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_flash_attention = lru_cache(maxsize=8)(flash_attention)
