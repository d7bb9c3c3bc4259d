# SPDX-License-Identifier: Apache-2.0
"""Which way prefills over cached context go: through the latent kernel, or expanded for FlashAttention; and in how many splits.

In: host numbers of a step. Out: a ``Cut`` of the keys for the latent kernel, and whether it is the faster way. Both ways are
estimated in microseconds of a layer, fitted to an H200: with queries as rows the estimates choose the faster way at every point
of docs/results/prefill-ways-h200.json (tests/gpu_ways.py). Next: cached_prefill and triton_path.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvsplice_kernels.decode import ROWS_TILE, TILE, launched_tile
from kvsplice_kernels.launch import Launch, has_rows, multiprocessors
from kvsplice_kernels.query_tiles import num_query_tiles
from vllm_kvsplice.launch import tuned
from vllm_kvsplice.serving.attention_layer import LayerCodec
from vllm_kvsplice.serving.metadata import Prefills, once

# Above so many tokens a step is expanded in any case: bounds what the latent kernel's scratch takes.
LATENT_TOKENS = 1024
PREFILL_SPLITS = (64, 32, 16, 8, 4)  # of the keys, of few prefill tokens: each is variants of reduce_expand to compile
PREFILL_PROGRAMS = 4  # of the latent kernel on a multiprocessor, where its launch is not one that counts them
LONG_STEP = 1024  # tokens: past the sizes at which the launchers change their tiles

# The latent kernel: a step of one key, and each key of the longest split, by a program that has a multiprocessor to itself and
# by one of as many as lie there. As columns: 32768 keys in one split on an H200, and half of what 1024 keys take eight programs a
# multiprocessor (docs/results/launch-columns-h200.json).
LATENT_US = 17.0
ROWS_KEY_US, COLUMNS_KEY_US = (1.48 / 64, 1.7 / 64), (1856 / 32768, 0.18)
# Expanding: a piece's launches, the host's share in them, each key of each KV head (its codes read, 16-bit K and V written and read), and FlashAttention's
# time for each key that a query row sees.
PIECE_US, EXPANDED_KEY_US, FLASH_US = 30.0, 0.45e-3, 1.2e-6


class Cut(NamedTuple):
    """How the latent kernel cuts a step's keys."""

    splits: int
    fill: float  # programs, of those that the GPU holds at once
    key_us: tuple[float, float]


class Work(NamedTuple):
    """What a step's prefills attend to."""

    longest: int  # keys that one request sees
    keys: int  # that all of them see
    row_keys: int  # those of every query row (token and query head of a KV head), summed
    pieces: int  # in which they would be expanded


def cut_keys(codec: LayerCodec, requests: Prefills, with_fresh: bool, device: torch.device) -> Cut:
    """The same for all layers of a kind: few query tokens, the end of a prompt that is cached, would leave the GPU empty. As many
    splits as the programs that lie on a multiprocessor, each with four tiles of keys or more, and the scratch of a longer step
    allow. ``with_fresh``: first chunks attend to fresh keys and values, and the latent kernel skips them."""
    group = codec.num_heads // codec.num_kv_heads

    def choose() -> Cut:
        launch = tuned(codec.layout, group, LONG_STEP, device)
        return _cut(group, codec.num_kv_heads, requests, with_fresh, multiprocessors(device), launch)

    return once(requests.shared, ("cut", codec, with_fresh, device), choose)


def _cut(
    group: int, num_kv_heads: int, requests: Prefills, with_fresh: bool, num_sms: int, launch: Launch | None
) -> Cut:
    rows = has_rows(launch)
    tile_tokens, _ = launched_tile(group, LONG_STEP, launch)
    programs = _query_tiles(requests, with_fresh, tile_tokens) * num_kv_heads
    known = requests.seq_lens_cpu
    longest = requests.max_seq_len if known is None else int(known.max())
    at_once = num_sms * (launch.programs if launch and rows else PREFILL_PROGRAMS)
    most = min(
        at_once // programs, longest // (4 * (ROWS_TILE if rows else TILE)), LATENT_TOKENS // requests.num_tokens
    )
    splits = next((splits for splits in PREFILL_SPLITS if splits <= most), 1)
    return Cut(splits, programs * splits / at_once, ROWS_KEY_US if rows else COLUMNS_KEY_US)


def _query_tiles(requests: Prefills, with_fresh: bool, tile_tokens: int) -> int:
    """Tiles of query tokens that the latent kernel has work for."""
    if requests.seq_lens_cpu is None:
        return num_query_tiles(requests.num_tokens, requests.num_reqs, LONG_STEP, tile_tokens)
    query_lens = requests.query_start_loc_cpu.diff().tolist()
    skipped = [with_fresh and first for first in requests.first_chunk]
    return max(1, sum(-(-n // tile_tokens) for n, skip in zip(query_lens, skipped, strict=True) if not skip))


def latent_is_faster(cut: Cut, work: Work, num_kv_heads: int) -> bool:
    """Whether the latent kernel serves a step's prefills sooner than FlashAttention does over their expanded codes."""
    alone, full = cut.key_us
    key_us = (alone + (full - alone) * min(1.0, cut.fill)) * max(1.0, cut.fill)
    latent = LATENT_US + key_us * work.longest / cut.splits
    expanded = PIECE_US * work.pieces + num_kv_heads * (EXPANDED_KEY_US * work.keys + FLASH_US * work.row_keys)
    return latent <= expanded
