# SPDX-License-Identifier: Apache-2.0
"""Prefill of one layer as jobs: a chunk of tokens is stored, and attends to itself and to what is cached before it.

In: a job. Out: ``Prepared`` calls: ours through the path that serves (serving.triton_path), peers through their caches.
Timed as launched, without a CUDA graph, as prefills run in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_kvsplice.bench import kernels_ours, kernels_peers
from vllm_kvsplice.bench.kernels_data import (
    Batch,
    Call,
    Prepared,
    Shape,
    exact_attention,
    fill_pages,
    make_batch,
    normal,
    num_copies,
    relative_error,
    slots_of,
)
from vllm_kvsplice.bench.kernels_jobs import OURS, Job
from vllm_kvsplice.bench.kernels_ours import WIDE, Codec, make_codec
from vllm_kvsplice.bench.kernels_timing import Device
from vllm_kvsplice.bench.peers import open_cache
from vllm_kvsplice.codec import reference

MOST_COPIES = 4
CHECKED_ROWS = 16
SERVER = 256, 8192, 32768  # the server's max_num_seqs, max_num_batched_tokens and max_model_len, at least


def prefill(job: Job, device: Device, copies: int | None) -> Prepared:
    """The chunk's cache write and attention, one after another; the write is also a stage of its own."""
    return _ours(job, device, copies) if job.kernel == OURS else _peer(job, device, copies)


class Served(NamedTuple):
    """A chunk's calls, one for each block table; attention goes into batch.out."""

    both: list[Call]
    writes: list[Call]
    attends: list[Call]


def serve(codec: Codec, shape: Shape, batch: Batch, cache: Tensor, fresh: tuple[Tensor, Tensor]) -> Served:
    """A chunk's cache write and attention, as the backend serves them in a layer that is not the first of its step."""
    from vllm_kvsplice.serving import triton_path
    from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, Limits
    from vllm_kvsplice.serving.metadata import Prefills

    bases = Bases(**{name: getattr(codec, name) for name in Bases._fields})
    limits = Limits(SERVER[0], max(SERVER[1], shape.num_queries), max(SERVER[2], shape.context))
    layer = LayerCodec(
        codec.layout,
        codec.layout.bytes_per_token_head,
        WIDE,
        shape.num_heads,
        shape.num_kv_heads,
        shape.scale,
        sliding_window=None,
        soft_cap=None,
    )

    tensors = triton_path.Tensors(bases, codec.prepared)

    def calls(table: Tensor, slots: Tensor) -> tuple[Call, Call, Call]:
        step = Prefills(
            shape.batch,
            shape.num_queries,
            shape.query_len,
            shape.context,
            batch.query_start_loc,
            batch.seq_lens,
            table,
            query_start_loc_cpu=batch.query_start_loc.cpu(),
            first_chunk=[shape.context == shape.query_len] * shape.batch,
            seq_lens_cpu=batch.seq_lens.cpu(),
            limits=limits,
        )
        attend = partial(triton_path.prefill, layer, tensors, batch.query)
        rest = fresh, cache, step, batch.out
        write = partial(triton_path.write, layer, tensors, *fresh, cache, slots, step.shared)
        return partial(attend, (*fresh, slots), *rest), write, partial(attend, None, *rest)

    found = [calls(table, slots) for table, slots in zip(batch.tables, _new_slots(batch, shape), strict=True)]
    return Served(*map(list, zip(*found, strict=True)))


def _ours(job: Job, device: Device, copies: int | None) -> Prepared:
    shape, codec = job.shape, make_codec(job.layout, job.heads[1], device.name)
    cell = shape.num_kv_heads * codec.layout.bytes_per_token_head
    batch = _batch(shape, cell, device, copies)
    cache = codec.make_cache(batch.num_blocks, shape.num_kv_heads, shape.block_size, device.name)
    fill_pages((cache,), shape.block_size, lambda slots: kernels_ours.write_random_latents(codec, cache, slots))
    key, value = _fresh(shape, device)
    served = serve(codec, shape, batch, cache, (key, value))

    def check() -> float:
        batch.out.fill_(float("nan"))
        served.both[0]()
        rows = min(CHECKED_ROWS, shape.query_len)
        exact = (
            []
            if shape.context == shape.query_len
            else [kernels_ours.latent_reference(codec, cache, batch, shape, rows)]
        )
        exact.append(_exact_on_fresh(codec, cache, batch, shape, key, value, rows))
        # A continued chunk may attend to its own tokens as codes or as they are: either is right.
        return min(relative_error(batch.out[-rows:], e) for e in exact)

    return _prepared(shape, cell, served, check, kernels_ours.ATTENTION_TOLERANCE)


def _exact_on_fresh(
    codec: Codec, cache: Tensor, batch: Batch, shape: Shape, key: Tensor, value: Tensor, rows: int
) -> Tensor:
    """Exact attention of the last rows to the cached tokens as decoded from codes, and to the chunk's own as they are."""
    cached = shape.context - shape.query_len
    own_key, own_value = key[-shape.query_len :], value[-shape.query_len :]
    if not cached:
        return exact_attention(batch.query[-rows:], own_key, own_value, shape.scale)
    blocks = batch.tables[0][-1, : -(-cached // shape.block_size)].long()
    k_plan, v_plan = codec.plans(shape.block_size)
    sides = ((k_plan, codec.k_decode, codec.k_mean, own_key), (v_plan, codec.v_decode, codec.v_mean, own_value))
    both = []
    for plan, decode, mean, own in sides:
        z = reference.read_side(cache, plan, blocks, torch.float64, WIDE)[:, :cached].transpose(0, 1)
        both.append(torch.cat([reference.expand(z, decode.double(), mean.double()), own.double()]))
    keys, values = both
    return exact_attention(batch.query[-rows:], keys, values, shape.scale)


def _peer(job: Job, device: Device, copies: int | None) -> Prepared:
    shape, cell = job.shape, kernels_peers.cell_bytes(job)
    batch = _batch(shape, cell, device, copies)
    cache = open_cache(job.kernel, job.preset, shape, batch.num_blocks, device.name)
    key, value = kernels_peers.fill(cache, batch, shape)
    fresh_key, fresh_value = _fresh(shape, device)
    writes: list[Call] = [partial(cache.write, fresh_key, fresh_value, s) for s in _new_slots(batch, shape)]
    attend = cache.attention(batch, shape)
    attends: list[Call] = [partial(attend, table) for table in batch.tables]
    key[-shape.query_len :], value[-shape.query_len :] = fresh_key[-shape.query_len :], fresh_value[-shape.query_len :]

    def check() -> float:
        writes[0]()
        return kernels_peers.check_last(batch, shape, key, value, attends[0], CHECKED_ROWS)

    def both(write: Call, attend: Call) -> None:
        write()
        attend()

    calls: list[Call] = [partial(both, w, a) for w, a in zip(writes, attends, strict=True)]
    return _prepared(shape, cell, Served(calls, writes, attends), check, cache.tolerance)


def _prepared(shape: Shape, cell: int, served: Served, check: Callable[[], float], tolerance: float) -> Prepared:
    stages: dict[str, tuple[list[Call], int | None]] = {
        "cache_write": (served.writes, None),
        "attention": (served.attends, None),
    }
    return Prepared(served.both, check, tolerance, _bytes(shape, cell), graph=False, stages=stages)


def _batch(shape: Shape, cell: int, device: Device, copies: int | None) -> Batch:
    return make_batch(
        shape,
        copies or num_copies(shape.batch * shape.context * cell, device.cold_bytes, MOST_COPIES),
        device.name,
    )


def _fresh(shape: Shape, device: Device) -> tuple[Tensor, Tensor]:
    key, value = (normal(shape.num_queries, shape.num_kv_heads, shape.head_dim, device.name) for _ in range(2))
    return key, value


def _new_slots(batch: Batch, shape: Shape) -> list[Tensor]:
    """For each block table, the slots of every request's last ``query_len`` tokens, request by request."""
    first, last = shape.context - shape.query_len, shape.context
    return [torch.cat([slots_of(row, first, last, shape.block_size) for row in table]) for table in batch.tables]


def _bytes(shape: Shape, cell: int) -> int:
    """What has to be read and written at least: cached tokens, the chunk's keys, values, queries and outputs."""
    token = 2 * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    return shape.batch * (shape.context * cell + shape.query_len * token)
