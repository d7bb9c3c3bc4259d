# SPDX-License-Identifier: Apache-2.0
"""The write and read paths on a GPU: hands vLLM's tensors to the kernels. No sync, no allocation but vLLM's workspace.

Same three functions as torch_path, and the reservation of scratch that a server wants before it starts.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from kvsplice_kernels.attention import BoundAttention, Workspace, bind_attention, choose_num_splits, workspace_shapes
from kvsplice_kernels.cache_write import bind_write
from kvsplice_kernels.decode import latent_ranks
from kvsplice_kernels.dispatch import Bound
from kvsplice_kernels.encode import Prepared
from kvsplice_kernels.launch import Launch, multiprocessors
from kvsplice_kernels.write_and_project import bind_write_and_project
from vllm_kvsplice.codec.layout import BLOCK_MULTIPLE
from vllm_kvsplice.launch import tuned
from vllm_kvsplice.serving import cached_prefill, fallback_attention, routes
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, Limits, bases_of, prepared_of
from vllm_kvsplice.serving.metadata import Prefills, Requests, like, once
from vllm_kvsplice.serving.refusals import FLASH_HEAD_DIM
from vllm_kvsplice.serving.routes import LATENT_TOKENS, LONG_STEP, PREFILL_SPLITS
from vllm_kvsplice.serving.vllm_compat import flash_attention, workspace

Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
Written = tuple[Tensor, Tensor, Tensor]  # key and value [>= T, H, head_dim], slot_mapping [T]


class Tensors(NamedTuple):
    """A layer's projector, in fp32 and as the kernels want it."""

    bases: Bases
    prepared: Prepared


class BoundCodes(NamedTuple):
    """Launches of the latent kernel."""

    write_and_project: Bound | None  # None: keys and values are stored, and attention projects the queries
    attention: BoundAttention


def tensors_of(layer: Any) -> Tensors:
    """What the functions below need of a layer's projector, read from it each time."""
    return Tensors(bases_of(layer), prepared_of(layer))


def write(
    codec: LayerCodec,
    tensors: Tensors,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    shared: dict[Any, Any] | None = None,
) -> None:
    """Encode keys and values [>= T, H, head_dim] into the slots of ``slot_mapping`` [T]; -1 is skipped.

    ``shared``: of the step, see metadata.Requests.
    """
    shared = {} if shared is None else shared
    kind = "write", codec, *like(key, value, kv_cache, slot_mapping)
    bound = once(
        shared,
        kind,
        lambda: bind_write(
            key, value, kv_cache, slot_mapping, tensors.prepared, *plans(codec, kv_cache), codec.wide_dtype
        )[0],
    )
    bound(key, value, kv_cache, slot_mapping, *tensors.prepared[:4])


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
    reqs, longest, device = requests.num_reqs, requests.max_query_len, query.device
    kind = "decode splits", codec, device
    splits = once(requests.shared, kind, lambda: num_splits(codec, reqs, longest, requests.max_seq_len, device))
    attend_codes(codec, tensors, query, written, kv_cache, requests, out, splits, False, longest)


def prefill(
    codec: LayerCodec,
    tensors: Tensors,
    query: Tensor,
    written: Written | None,
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
    alone = fresh is not None and all(requests.first_chunk)
    flash = flash_attends(codec.layout.head_dim, codec.soft_cap)
    pieces = cached_prefill.plan(codec, requests, fresh is not None, query.device) if flash and not alone else None
    if written is not None and (alone or pieces is not None):
        key, value, slots = written
        write(codec, tensors, key, value, kv_cache, slots, requests.shared)
    if flash and pieces is not None:
        cached_prefill.attend(codec, tensors.bases, query, fresh, kv_cache, requests, out, pieces, flash)
        return
    if fresh is not None and first:  # over all rows; those of continued requests are written over
        fresh_attention(codec, query, *fresh, requests, out)
    if alone:
        return
    # As an upper bound: with the true one every short tail of a prompt would be a kernel variant of its own.
    longest = max(requests.max_query_len, LONG_STEP)
    splits = routes.cut_keys(codec, requests, fresh is not None, query.device).splits
    attend_codes(
        codec, tensors, query, written, kv_cache, requests, out, splits, skip_first_chunks=first, longest=longest
    )


def fresh_attention(
    codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor, requests: Prefills, out: Tensor
) -> None:
    """Causal FlashAttention of each request over its own new keys and values."""
    flash = flash_attends(codec.layout.head_dim, codec.soft_cap)
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
    expands = flash_attends(codec.layout.head_dim, codec.soft_cap) and codec.layout.head_dim <= FLASH_HEAD_DIM
    query_lens = range(1, decode_query_len + 1)
    launches = [launch_of(codec, n, device) for n in (*query_lens, LONG_STEP)]
    widest = max(launches, key=lambda launch: sum(latent_ranks(*codec.layout.plans(BLOCK_MULTIPLE), launch)))
    wanted = [_shapes(codec, most_latent_tokens(codec, max_tokens), 1, widest)]
    wanted += [_shapes(codec, min(max_tokens, LATENT_TOKENS // n), n, widest) for n in PREFILL_SPLITS]
    if expands:
        limits = Limits(max_num_seqs, max_tokens, max_seq_len)
        wanted.append(cached_prefill.scratch_shapes(codec, limits, codec.wide_dtype))
    for num_reqs in range(1, max_num_seqs + 1):
        splits = max(num_splits(codec, num_reqs, n, max_seq_len, device) for n in query_lens)
        wanted.append(_shapes(codec, min(num_reqs * decode_query_len, max_tokens), splits, widest))
    workspace(*max(wanted, key=lambda shapes: sum(-(-prod(s) * d.itemsize // 256) for s, d in shapes)))


def num_splits(codec: LayerCodec, num_reqs: int, max_query_len: int, max_seq_len: int, device: torch.device) -> int:
    """Splits of a decode step, for the launch that it gets.

    Sums are cut where keys are split, so a step that is not replayed from a CUDA graph is planned as one that is: for as many
    requests as vLLM's graph would have, and, in metadata, for the longest sequence that the engine allows.
    """
    found = launch_of(codec, max_query_len, device)
    padded = graph_reqs(num_reqs, max_query_len)
    return choose_num_splits(padded, codec.num_kv_heads, max_seq_len, multiprocessors(device), found)


@lru_cache(maxsize=4096)
def graph_reqs(num_reqs: int, query_len: int) -> int:
    """Requests of the CUDA graph that vLLM replays for ``num_reqs`` of ``query_len`` tokens each, by the sizes that it captures
    unless told otherwise: of a grid in requests, and of the same in tokens, rounded up to whole requests. Where it captures
    its largest batch besides, both are planned alike: a count on the way to the next of a grid gets that one's plan."""
    least = (num_reqs - 1) * query_len + 1  # tokens; a size from here on has room once it is rounded up
    return min(_capture_size(num_reqs), cdiv(_capture_size(least), query_len))


def _capture_size(count: int) -> int:
    """1, 2, 4, 8, then by 8 to 256, then by 16: vLLM's VllmConfig._set_cudagraph_sizes."""
    multiple = next_power_of_2(count) if count <= 8 else 8 if count <= 256 else 16
    return cdiv(count, multiple) * multiple


def launch_of(codec: LayerCodec, max_query_len: int, device: torch.device) -> Launch | None:
    """The tuned launch of decode, see vllm_kvsplice.launch."""
    return tuned(codec.layout, codec.num_heads // codec.num_kv_heads, max_query_len, device)


def most_latent_tokens(codec: LayerCodec, max_tokens: int) -> int:
    """Prefill tokens of a step that the latent kernel may be given."""
    expands = flash_attends(codec.layout.head_dim, codec.soft_cap) and codec.layout.head_dim <= FLASH_HEAD_DIM
    return min(max_tokens, LATENT_TOKENS) if expands and not codec.draft_slots else max_tokens


def plans(codec: LayerCodec, kv_cache: Tensor) -> tuple[Any, Any]:
    return codec.layout.plans(kv_cache.shape[2])


def attend_codes(
    codec: LayerCodec,
    tensors: Tensors,
    query: Tensor,
    written: Written | None,
    kv_cache: Tensor,
    requests: Requests,
    out: Tensor,
    splits: int,
    skip_first_chunks: bool,
    longest: int,
) -> None:
    """The latent kernel, ``written`` stored first; ``longest``: upper bound of the requests' query tokens, by which the decodes
    and the prefills of a step differ."""
    kind = "codes", codec, splits, skip_first_chunks, longest, *like(query, kv_cache, out, *(written or ()))
    write_and_project, attention = once(
        requests.shared,
        kind,
        lambda: _bind_codes(
            codec, tensors, query, written, kv_cache, requests, out, splits, skip_first_chunks, longest
        ),
    )
    if written is not None and write_and_project is not None:
        key, value, slots = written
        bases = tensors.prepared.of_a_step(attention.rows)
        write_and_project(query, key, value, kv_cache, slots, *bases, *attention.work[:2])
    attention(query, kv_cache, tensors.prepared, requests.block_table, requests.seq_lens, requests.query_start_loc, out)


def _bind_codes(
    codec: LayerCodec,
    tensors: Tensors,
    query: Tensor,
    written: Written | None,
    kv_cache: Tensor,
    requests: Requests,
    out: Tensor,
    splits: int,
    skip_first_chunks: bool,
    longest: int,
) -> BoundCodes:
    launch = launch_of(codec, longest, query.device)
    attention, _ = bind_attention(
        query,
        kv_cache,
        *plans(codec, kv_cache),
        tensors.prepared,
        requests.block_table,
        requests.seq_lens,
        requests.query_start_loc,
        codec.scale,
        out,
        longest,
        splits,
        codec.sliding_window,
        codec.soft_cap,
        codec.wide_dtype,
        skip_first_chunks,
        Workspace(*workspace(*_shapes(codec, query.shape[0], splits, launch))),
        written is not None,
        launch,
    )
    if written is None:
        return BoundCodes(None, attention)
    key, value, slots = written
    rest = *plans(codec, kv_cache), *attention.work[:2], codec.wide_dtype, attention.rows
    bound, _ = bind_write_and_project(query, key, value, kv_cache, slots, tensors.prepared, *rest)
    return BoundCodes(bound, attention)


def _shapes(codec: LayerCodec, num_tokens: int, splits: int, launch: Launch | None) -> Shapes:
    ranks = latent_ranks(*codec.layout.plans(BLOCK_MULTIPLE), launch)
    return tuple((s, torch.float32) for s in workspace_shapes(num_tokens, codec.num_heads, *ranks, splits))


flash_attends = lru_cache(maxsize=8)(flash_attention)
