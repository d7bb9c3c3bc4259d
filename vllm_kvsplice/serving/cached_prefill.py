# SPDX-License-Identifier: Apache-2.0
"""Prefill over cached context at FlashAttention's speed: codes are expanded into fixed scratch, FlashAttention reads that.

In: the prefill rows of a step, some with tokens in the cache. Out: their rows of the output. Called by triton_path. A step
is cut into pieces by host numbers alone: runs of whole requests whose keys fit the scratch, each one causal call; and the
pieces of a request that does not fit, merged by their lse as vLLM does for MLA. A request's own tokens come from their
codes too, but for first chunks that attend to fresh keys and values, which are copied in where others are expanded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvsplice_kernels.dispatch import Bound
from kvsplice_kernels.expand_cached import START_MULTIPLE, bind_copy, bind_expand
from vllm_kvsplice.serving import routes
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, Limits
from vllm_kvsplice.serving.metadata import Prefills, like, once
from vllm_kvsplice.serving.refusals import FLASH_HEAD_DIM
from vllm_kvsplice.serving.spans import Ints, Span, round_up
from vllm_kvsplice.serving.spans import cut as cut_spans
from vllm_kvsplice.serving.vllm_compat import merge_attn_states, to_device, workspace

CONTEXT_TOKENS = 32 * 1024  # of scratch: 64 MiB of K and V at 4 KV heads of 128
Shape = tuple[tuple[int, ...], torch.dtype]
# Rows (tokens x heads) whose tiles of 128 occupy 0.8 of 132 multiprocessors: from there FlashAttention-3 would not gain by
# splitting the keys, for which it allocates scratch that vLLM's memory profile has not seen.
UNSPLIT_ROWS = 128 * 106
Flash = tuple[Any, int]  # flash_attn_varlen_func and its fa_version


class OnDevice(NamedTuple):
    """A piece's numbers for the kernels, int32."""

    query_start_loc: Tensor  # [num_reqs + 1], from 0
    cu_seqlens: Tensor  # [num_reqs + 1] rows of scratch
    starts: Tensor  # [num_reqs], see Span
    firsts: Tensor
    ends: Tensor  # stops; 0 where fresh keys and values are copied


@dataclass(frozen=True)
class Piece:
    """A span of a step as it is launched."""

    block_table: Tensor  # of its requests
    tokens: slice  # of the step
    num_keys: int
    max_query_len: int
    max_num_keys: int
    causal: bool
    merged: bool
    keeps_lse: bool  # another piece follows that merges into the same rows
    has_fresh: bool
    on_device: OnDevice


class Scratch(NamedTuple):
    """Of a step, from the workspace."""

    keys: list[tuple[Tensor, Tensor]]  # keys and values of each piece
    part: Tensor  # output of a piece that is merged
    lse: Tensor


class Fill(NamedTuple):
    """Launches that fill a piece's scratch."""

    expand: Bound
    copy: Bound | None  # of fresh keys and values


# ---------------------------------------------------------------- host numbers
def scratch_tokens(codec: LayerCodec, limits: Limits) -> int:
    """Tokens of scratch: CONTEXT_TOKENS, but a step's own tokens and a request's window always fit, and never in vain."""
    own = limits.max_num_batched_tokens + START_MULTIPLE
    most = max(CONTEXT_TOKENS, own + min(codec.sliding_window or 0, limits.max_model_len))
    ever = limits.max_num_seqs * round_up(limits.max_model_len)
    return min(round_up(most), ever)


def scratch_shapes(codec: LayerCodec, limits: Limits, dtype: torch.dtype) -> tuple[Shape, ...]:
    """Shapes and dtypes of the most that ``attend`` takes from the workspace."""
    tokens = scratch_tokens(codec, limits)
    long = min(limits.max_num_batched_tokens, limits.max_model_len) if limits.max_model_len > tokens else 0
    return _shapes(codec, tokens, long, dtype)


def _shapes(codec: LayerCodec, num_keys: int, num_tokens: int, dtype: torch.dtype) -> tuple[Shape, ...]:
    """Expanded keys, values; output and lse of a piece that is merged, of as many tokens as a long request has."""
    kv, heads, head_dim = (num_keys, codec.num_kv_heads, codec.layout.head_dim), codec.num_heads, codec.layout.head_dim
    shapes: tuple[Shape, ...] = ((kv, dtype), (kv, dtype))
    return (*shapes, ((num_tokens, heads, head_dim), dtype), ((heads, num_tokens), torch.float32))


# ---------------------------------------------------------------- one step
def plan(codec: LayerCodec, requests: Prefills, with_fresh: bool, device: torch.device) -> list[Piece] | None:
    """The pieces of a step, the same for all layers of a kind; None where the latent kernel serves it better, or must.

    ``with_fresh``: first chunks attend to fresh keys and values.
    """
    if requests.seq_lens_cpu is None or codec.layout.head_dim > FLASH_HEAD_DIM:
        return None
    kind = "pieces", codec, with_fresh, device
    return once(requests.shared, kind, lambda: _plan_of(codec, requests, with_fresh, device))


def _plan_of(codec: LayerCodec, requests: Prefills, with_fresh: bool, device: torch.device) -> list[Piece] | None:
    """Codecs that differ in layout alone have the same pieces, and one copy of their numbers, unless their kernels differ too."""
    limits = requests.limits or Limits(requests.num_reqs, requests.num_tokens, requests.max_seq_len)
    window, capacity = codec.sliding_window, scratch_tokens(codec, limits)
    cut = routes.cut_keys(codec, requests, with_fresh, device)
    key = cut, window, capacity, codec.num_heads // codec.num_kv_heads, codec.num_kv_heads, with_fresh, device
    return once(requests.shared, key, lambda: _plan(requests, *key))


def _plan(
    requests: Prefills,
    cut: routes.Cut,
    window: int | None,
    capacity: int,
    group: int,
    num_kv_heads: int,
    with_fresh: bool,
    device: torch.device,
) -> list[Piece] | None:
    query_start_loc = requests.query_start_loc_cpu.numpy().astype(np.int64)
    query_lens, seq_lens = np.diff(query_start_loc), np.asarray(requests.seq_lens_cpu, np.int64)
    fresh = np.array(requests.first_chunk) & with_fresh
    visible = np.where(fresh, 0, np.minimum(seq_lens, query_lens + (window or requests.max_seq_len)))
    spans = cut_spans(query_lens, seq_lens, window, capacity)
    row_keys = (query_lens * visible).sum() * group
    work = routes.Work(int(visible.max()), int(visible.sum()), int(row_keys), len(spans))
    if requests.num_tokens <= routes.LATENT_TOKENS and routes.latent_is_faster(cut, work, num_kv_heads):
        return None
    return _to_device(spans, query_start_loc, fresh, requests.block_table, device)


def _to_device(
    spans: list[Span], query_start_loc: Ints, fresh: NDArray[np.bool_], block_table: Tensor, device: torch.device
) -> list[Piece]:
    """Pieces of the spans, their numbers in one copy."""
    packed: list[Ints] = []
    for span in spans:
        bounds, own = query_start_loc[span.first : span.last + 1], fresh[span.first : span.last]
        cu_seqlens = np.concatenate([[0], np.cumsum(span.stops - span.starts)])
        packed += [bounds - bounds[0], cu_seqlens, span.starts, span.firsts, np.where(own, 0, span.stops)]
    flat = to_device(torch.from_numpy(np.concatenate(packed).astype(np.int32)), device)
    tensors = flat.split([len(numbers) for numbers in packed])
    pieces = []
    for i, span in enumerate(spans):
        bounds, keys = query_start_loc[span.first : span.last + 1], span.stops - span.starts
        pieces.append(
            Piece(
                block_table=block_table[span.first : span.last],
                tokens=slice(int(bounds[0]), int(bounds[-1])),
                num_keys=int(keys.sum()),
                max_query_len=int(np.diff(bounds).max()),
                max_num_keys=int(keys.max()),
                causal=span.causal,
                merged=span.merged,
                keeps_lse=i + 1 < len(spans) and spans[i + 1].merged,
                has_fresh=bool(fresh[span.first : span.last].any()),
                on_device=OnDevice(*tensors[5 * i : 5 * i + 5]),
            )
        )
    return pieces


def attend(
    codec: LayerCodec,
    bases: Bases,
    query: Tensor,
    fresh: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    requests: Prefills,
    out: Tensor,
    pieces: list[Piece],
    flash: Flash,
) -> None:
    """Attend every row of ``query`` [T, num_heads, head_dim] into ``out``, by the pieces that ``plan`` made.

    ``fresh``: key and value [T, H, head_dim] of the step, for first chunks; None: those read their codes as well.
    """
    # shared holds the pieces, so that no other list gets their id.
    kind = "filled", id(pieces), codec, query.dtype, *like(kv_cache, *(fresh or ()))
    (keys, part, other_lse), fills = once(
        requests.shared, kind, lambda: _bind_fills(codec, bases, fresh, kv_cache, requests, pieces, query.dtype)
    )
    lse = spare = other_lse
    for piece, (k, v), fill in zip(pieces, keys, fills, strict=True):
        _fill(bases, fresh, kv_cache, piece, k, v, fill)
        q, rows = query[piece.tokens], out[piece.tokens]
        if not piece.merged:
            lse, spare = _attend_piece(codec, q, k, v, rows, piece, flash), other_lse
            continue
        part_rows = part[: rows.shape[0]]
        part_lse = _attend_piece(codec, q, k, v, part_rows, piece, flash)
        merged = spare.view(-1)[: lse.numel()].view(lse.shape)
        merge_attn_states(rows, merged, lse, part_rows, part_lse)
        lse, spare = merged, lse


def _bind_fills(
    codec: LayerCodec,
    bases: Bases,
    fresh: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    requests: Prefills,
    pieces: list[Piece],
    dtype: torch.dtype,
) -> tuple[Scratch, list[Fill]]:
    """Scratch of the pieces and the launches that fill it."""
    kind = "scratch", id(pieces), codec.num_heads, codec.layout.head_dim, dtype
    scratch = once(requests.shared, kind, lambda: _scratch(codec, pieces, dtype))
    both = zip(pieces, scratch.keys, strict=True)
    return scratch, [_bind_fill(codec, bases, fresh, kv_cache, piece, *kv) for piece, kv in both]


def _scratch(codec: LayerCodec, pieces: list[Piece], dtype: torch.dtype) -> Scratch:
    """From the workspace."""
    long = max((p.tokens.stop - p.tokens.start for p in pieces if p.merged), default=0)
    key, value, part, lse = workspace(*_shapes(codec, max(p.num_keys for p in pieces), long, dtype))
    return Scratch([(key[: p.num_keys], value[: p.num_keys]) for p in pieces], part, lse)


def _bind_fill(
    codec: LayerCodec,
    bases: Bases,
    fresh: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    piece: Piece,
    key: Tensor,
    value: Tensor,
) -> Fill:
    on_device = piece.on_device
    expand, _ = bind_expand(
        kv_cache,
        *codec.layout.plans(kv_cache.shape[2]),
        piece.block_table,
        on_device.ends,
        on_device.cu_seqlens,
        (bases.k_decode, bases.k_mean),
        (bases.v_decode, bases.v_mean),
        key,
        value,
        piece.max_num_keys,
        codec.wide_dtype,
        on_device.starts,
        on_device.firsts,
    )
    if fresh is None or not piece.has_fresh:
        return Fill(expand, None)
    own = (x[piece.tokens] for x in fresh)
    copy, _ = bind_copy(*own, on_device.query_start_loc, on_device.ends, on_device.cu_seqlens, key, value)
    return Fill(expand, copy)


def _fill(
    bases: Bases,
    fresh: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    piece: Piece,
    key: Tensor,
    value: Tensor,
    fill: Fill,
) -> None:
    """A piece's keys and values into scratch [num_keys, H, head_dim]."""
    query_start_loc, cu_seqlens, starts, firsts, ends = piece.on_device
    decodes = bases.k_decode, bases.k_mean, bases.v_decode, bases.v_mean
    fill.expand(kv_cache, piece.block_table, starts, firsts, ends, cu_seqlens, *decodes, key, value)
    if fresh is not None and fill.copy is not None:
        own = (x[piece.tokens] for x in fresh)
        fill.copy(*own, query_start_loc, ends, cu_seqlens, key, value)


def _attend_piece(
    codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor, out: Tensor, piece: Piece, flash: Flash
) -> Tensor:
    """FlashAttention of a piece into ``out``; returns its lse [num_heads, T] fp32 where it is wanted, else nothing of use."""
    flash_attn_varlen_func, version = flash
    wanted = piece.keeps_lse or piece.merged
    result = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=piece.on_device.query_start_loc,
        cu_seqlens_k=piece.on_device.cu_seqlens,
        max_seqlen_q=piece.max_query_len,
        max_seqlen_k=piece.max_num_keys,
        softmax_scale=codec.scale,
        causal=piece.causal,
        window_size=[codec.sliding_window - 1, 0] if codec.sliding_window else [-1, -1],
        softcap=codec.soft_cap or 0.0,
        return_softmax_lse=wanted,
        fa_version=version,
        num_splits=1 if query.shape[0] * query.shape[1] >= UNSPLIT_ROWS else 0,
    )
    lse: Tensor = result[1] if wanted else out
    return lse


def warm_up(codec: LayerCodec, bases: Bases, kv_cache: Tensor, dtype: torch.dtype) -> None:
    """Compile what ``attend`` launches; nothing is computed."""
    heads, head_dim, device = codec.num_kv_heads, codec.layout.head_dim, kv_cache.device
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    bounds, row = zero.expand(2).contiguous(), torch.zeros(1, heads, head_dim, dtype=dtype, device=device)
    on_device = OnDevice(bounds, bounds, zero, zero, zero)
    piece = Piece(zero[None], slice(0, 1), 1, 1, 1, True, False, False, True, on_device)
    _fill(bases, (row, row), kv_cache, piece, row, row, _bind_fill(codec, bases, (row, row), kv_cache, piece, row, row))
