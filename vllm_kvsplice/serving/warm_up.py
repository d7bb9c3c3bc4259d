# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled before the first request: one empty step of every kind that a server can meet, run on a GPU.

In: a layer's codec and vLLM's limits. Out: Triton's cache of compiled kernels, filled. Nothing is computed and nothing kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from kvsplice_kernels.cache_write import write_tiles
from kvsplice_kernels.checks import next_power_of_2
from kvsplice_kernels.decode import latent_ranks, launched_tile
from kvsplice_kernels.launch import has_rows, takes_64_rows
from kvsplice_kernels.project_query import query_tiles
from kvsplice_kernels.reduce_expand import ReduceTiles, reduce_tiles
from kvsplice_kernels.write_and_project import step_sizes
from vllm_kvsplice.codec.layout import BLOCK_MULTIPLE
from vllm_kvsplice.serving import cached_prefill
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, Limits, prepared_for
from vllm_kvsplice.serving.metadata import Requests
from vllm_kvsplice.serving.refusals import FLASH_HEAD_DIM
from vllm_kvsplice.serving.routes import LATENT_TOKENS, LONG_STEP, PREFILL_SPLITS
from vllm_kvsplice.serving.triton_path import (
    Tensors,
    Written,
    attend_codes,
    decode,
    flash_attends,
    launch_of,
    most_latent_tokens,
    num_splits,
    plans,
    write,
)

THREADS = 8
MOST_QUERY_LENS = 64  # of decode steps that are looked at one by one; a tile has no more tokens
Step = Callable[[], None]


def warm_up(
    codec: LayerCodec, block_size: int, dtype: torch.dtype, device: torch.device, decode_query_len: int, limits: Limits
) -> None:
    """Compile every kernel for every kind of step now, rather than during the first requests; nothing is computed."""
    D, cell, most = codec.layout.head_dim, codec.bytes_per_token_head, limits.max_num_batched_tokens
    cache = torch.zeros(1, codec.num_kv_heads, block_size, cell, dtype=torch.uint8, device=device)
    bases = _blank_bases(codec, device)
    tensors = Tensors(bases, prepared_for(bases, codec.layout, device))
    steps: list[Step] = []
    if flash_attends(D, codec.soft_cap) and D <= FLASH_HEAD_DIM:
        steps.append(partial(cached_prefill.warm_up, codec, bases, cache, dtype))

    def rows(tokens: int) -> tuple[Tensor, Written]:
        query, key = (
            torch.zeros(tokens, n, D, dtype=dtype, device=device) for n in (codec.num_heads, codec.num_kv_heads)
        )
        return query, (key, key, torch.full((tokens,), -1, dtype=torch.int64, device=device))

    def long_step(tokens: int) -> None:
        query, written = rows(tokens)
        key, value, slots = written
        write(codec, tensors, key, value, cache, slots)
        if tokens <= most_latent_tokens(codec, most):
            latent_step(tokens, 1, written)
            latent_step(tokens, 1)

    def latent_step(tokens: int, splits: int, written: Written | None = None) -> None:
        query, _ = rows(tokens)
        for skip in (False, True):
            empty = _empty_requests(1, LONG_STEP, LONG_STEP, device)
            out = torch.empty_like(query)
            attend_codes(codec, tensors, query, written, cache, empty, out, splits, skip, LONG_STEP)

    def decode_step(num_reqs: int, query_len: int) -> None:
        query, written = rows(num_reqs * query_len)
        empty = _empty_requests(num_reqs, query_len, limits.max_model_len, device)
        decode(codec, tensors, query, written, cache, empty, torch.empty_like(query))

    sizes = step_sizes(most, codec.num_heads, codec.num_kv_heads, D, *plans(codec, cache))
    steps += [partial(long_step, tokens) for tokens in sizes]
    steps += [partial(latent_step, *s) for s in split_steps(codec, most, device)]
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

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(run, steps))
    torch.cuda.synchronize(device)


def decode_steps(
    codec: LayerCodec, block_size: int, decode_query_len: int, limits: Limits, device: torch.device
) -> list[tuple[int, int]]:
    """(requests, query tokens of each) of few decode steps that meet every variant of every kernel."""
    group, layout = codec.num_heads // codec.num_kv_heads, codec.layout
    both, head_dim = layout.plans(block_size), layout.head_dim
    seen: set[object] = set()
    found: list[tuple[int, int]] = []
    for query_len in _query_lens(decode_query_len):
        launch = launch_of(codec, query_len, device)
        ranks = k_rank, v_rank = latent_ranks(*both, launch)
        tile = launched_tile(group, query_len, launch)
        for num_reqs in range(1, limits.max_num_seqs + 1):
            tokens = num_reqs * query_len
            if tokens > max(limits.max_num_batched_tokens, query_len):
                break
            project = query_tiles(tokens, group, head_dim, k_rank)
            block_t = write_tiles(tokens, codec.num_kv_heads, head_dim, both).block_t
            splits = num_splits(codec, num_reqs, query_len, limits.max_model_len, device)
            tiles = _reduce_tiles(codec, tokens, query_len, v_rank, splits, device)
            write = "write", block_t, project.block_m, project.block_r, k_rank, has_rows(launch)
            step = "decode", launch, tile, query_len <= tile[0], *ranks
            reduce = "reduce", query_len == 1, query_len <= tiles.tile_tokens, (splits - 1).bit_length(), tiles, v_rank
            variants = {write, step, reduce}
            if not variants <= seen:
                seen |= variants
                found.append((num_reqs, query_len))
    return found


def _query_lens(most: int) -> list[int]:
    """Query lengths of decode steps; longer ones are cut alike."""
    return sorted({*range(1, min(most, MOST_QUERY_LENS) + 1), most})


def split_steps(codec: LayerCodec, max_tokens: int, device: torch.device) -> list[tuple[int, int]]:
    """(tokens, splits) of few steps that meet every variant of reduce_expand that ``routes.cut_keys`` can ask for."""
    _, v_rank = latent_ranks(*codec.layout.plans(BLOCK_MULTIPLE), launch_of(codec, LONG_STEP, device))
    found: dict[object, tuple[int, int]] = {}
    for splits in (1, *PREFILL_SPLITS):
        for tokens in range(1, min(LATENT_TOKENS // splits, max_tokens) + 1):
            tiles = _reduce_tiles(codec, tokens, LONG_STEP, v_rank, splits, device)
            found.setdefault((splits, tiles), (tokens, splits))
    return list(found.values())


def _reduce_tiles(
    codec: LayerCodec, tokens: int, query_len: int, v_rank: int, splits: int, device: torch.device
) -> ReduceTiles:
    group, rank_pad = codec.num_heads // codec.num_kv_heads, max(16, next_power_of_2(v_rank))
    tall = takes_64_rows(device)
    return reduce_tiles(tokens * codec.num_heads, group, query_len, codec.layout.head_dim, rank_pad, splits, tall)


def _empty_requests(num_reqs: int, max_query_len: int, max_seq_len: int, device: torch.device) -> Requests:
    """Requests without tokens: kernels that are given them are compiled, and do nothing."""
    starts, lens = (torch.zeros(num_reqs + n, dtype=torch.int32, device=device) for n in (1, 0))
    table = torch.zeros(num_reqs, 1, dtype=torch.int32, device=device)
    return Requests(num_reqs, 0, max_query_len, max_seq_len, starts, lens, table)


def _blank_bases(codec: LayerCodec, device: torch.device) -> Bases:
    H, D = codec.num_kv_heads, codec.layout.head_dim
    ranks = codec.layout.rank("k"), codec.layout.rank("v")
    shapes = [shape for rank in ranks for shape in ((H, rank, D), (H, D, rank), (H, D))]
    return Bases(*(torch.zeros(shape, device=device, dtype=torch.float32) for shape in shapes))
