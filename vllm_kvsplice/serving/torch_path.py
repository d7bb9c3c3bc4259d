# SPDX-License-Identifier: Apache-2.0
"""The write and read paths in plain torch, fp32, through reference.py: what serves on a CPU, where Triton has no device.

Same three functions as triton_path; vLLM's tensors in, bytes in the cache or rows of ``out`` out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_kvsplice.codec import reference
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, bases_of
from vllm_kvsplice.serving.metadata import Prefills, Requests

Written = tuple[Tensor, Tensor, Tensor]  # key and value [>= T, H, head_dim], slot_mapping [T]
tensors_of = bases_of  # what these functions need of a layer's projector
QUERY_BLOCK = 256  # query rows attended at a time where SDPA has no form of the mask: bounds the logits' memory


def write(
    codec: LayerCodec,
    bases: Bases,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    shared: dict[Any, Any] | None = None,
) -> None:
    """Encode keys and values [>= T, H, head_dim] into the slots of ``slot_mapping`` [T]; -1 is skipped. ``shared``: unused."""
    block_size, tokens = kv_cache.shape[2], slot_mapping.shape[0]
    sides = (("k", key, bases.k_encode, bases.k_mean), ("v", value, bases.v_encode, bases.v_mean))
    for side, x, encode, mean in sides:
        z = reference.encode(x[:tokens].float(), encode, mean)
        plan = codec.layout.plan(side, block_size)  # type: ignore[arg-type]
        reference.write_side(kv_cache, z, plan, slot_mapping, codec.wide_dtype)


def decode(
    codec: LayerCodec,
    bases: Bases,
    query: Tensor,
    written: Written | None,
    kv_cache: Tensor,
    requests: Requests,
    out: Tensor,
) -> None:
    """Attend to codes: query [T, num_heads, head_dim] of ``requests`` -> ``out`` [T, num_heads, head_dim].

    ``written``: the step's key, value and slot_mapping, stored first; None if they are stored already.
    """
    if written is not None:
        key, value, slots = written
        write(codec, bases, key, value, kv_cache, slots)
    latent = reference.paged_attention(
        query,
        kv_cache,
        codec.layout,
        bases.k_decode,
        bases.k_mean,
        bases.v_decode,
        bases.v_mean,
        requests.block_table,
        requests.seq_lens,
        requests.query_start_loc,
        codec.scale,
        codec.sliding_window,
        codec.soft_cap,
        codec.wide_dtype,
        torch.float32,
    )
    out.copy_(latent)


def prefill(
    codec: LayerCodec,
    bases: Bases,
    query: Tensor,
    written: Written | None,
    fresh: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    requests: Prefills,
    out: Tensor,
) -> None:
    """Like ``decode``, but first chunks attend to ``fresh``, their own key and value [T, H, head_dim], where given."""
    if written is not None:
        key, value, slots = written
        write(codec, bases, key, value, kv_cache, slots)
    starts = requests.query_start_loc_cpu.tolist()
    for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        rows = slice(start, end)
        if fresh is not None and requests.first_chunk[b]:
            out[rows] = fresh_attention(codec, *(x[rows].float() for x in (query, *fresh)))
            continue
        one = Requests(
            1,
            end - start,
            end - start,
            requests.max_seq_len,
            torch.tensor([0, end - start], dtype=torch.int32),
            requests.seq_lens[b : b + 1],
            requests.block_table[b : b + 1],
        )
        decode(codec, bases, query[rows], None, kv_cache, one, out[rows])


def fresh_attention(codec: LayerCodec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one whole sequence [T, heads, head_dim] over its own keys and values, uncompressed."""
    T = query.shape[0]
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    if not codec.soft_cap and not (codec.sliding_window and codec.sliding_window < T):
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=codec.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        rows = query[start : start + QUERY_BLOCK]
        positions = torch.arange(start, start + len(rows), device=query.device)
        # With the identity as basis latents are the values themselves.
        parts.append(
            reference.attend(
                rows,
                k,
                v,
                codec.scale,
                None,
                positions,
                None,
                codec.sliding_window,
                codec.soft_cap,
            )[0]
        )
    return torch.cat(parts)
