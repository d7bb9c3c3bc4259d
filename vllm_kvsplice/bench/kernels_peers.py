# SPDX-License-Identifier: Apache-2.0
"""Peers as jobs: decode attention and cache write of any ``OpenCache``.

In: a job. Out: ``Prepared`` calls with a check against exact attention over the keys and values that were stored.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from vllm_kvsplice.bench.kernels_data import (
    Batch,
    Call,
    OpenCache,
    Prepared,
    Shape,
    exact_attention,
    fill_pages,
    make_batch,
    normal,
    num_copies,
    relative_error,
    slots_of,
    write_slots,
)
from vllm_kvsplice.bench.kernels_jobs import Job
from vllm_kvsplice.bench.kernels_timing import Device
from vllm_kvsplice.bench.peers import bytes_per_token_head, open_cache


def decode(job: Job, device: Device, copies: int | None) -> Prepared:
    """Attention of a decode step over a cache that the peer's own writer filled."""
    shape = job.shape
    moved = shape.batch * shape.context * cell_bytes(job)
    batch = make_batch(shape, copies or num_copies(moved, device.cold_bytes), device.name)
    cache = open_cache(job.kernel, job.preset, shape, batch.num_blocks, device.name)
    key, value = fill(cache, batch, shape)
    attend = cache.attention(batch, shape)
    calls: list[Call] = [partial(attend, table) for table in batch.tables]
    return Prepared(
        calls, lambda: check_last(batch, shape, key, value, calls[0]), cache.tolerance, moved, cache.num_splits
    )


def write(job: Job, device: Device, copies: int | None) -> Prepared:
    """The peer's cache write of ``query_len`` tokens, each call into other slots; keys and values are warm."""
    shape, cell = job.shape, cell_bytes(job)
    slots = write_slots(shape, cell, device.cold_bytes, copies, device.name)
    num_blocks = int(max(s.max() for s in slots)) // shape.block_size + 1
    cache = open_cache(job.kernel, job.preset, shape, num_blocks, device.name)
    key, value = (normal(shape.query_len, shape.num_kv_heads, shape.head_dim, device.name) for _ in range(2))
    calls: list[Call] = [partial(cache.write, key, value, s) for s in slots]
    moved = shape.query_len * (cell + 2 * key[0].nbytes)
    return Prepared(calls, lambda: _check_write(job, key, value, device), cache.tolerance, moved)


def cell_bytes(job: Job) -> int:
    """All-in bytes of a token, all KV heads together."""
    return job.heads[1] * bytes_per_token_head(job.kernel, job.preset, job.head_dim)


def fill(cache: OpenCache, batch: Batch, shape: Shape) -> tuple[Tensor, Tensor]:
    """Random tokens everywhere; returns key and value [context, num_kv_heads, head_dim] of the first table's last request."""
    H, D, device = shape.num_kv_heads, shape.head_dim, str(batch.query.device)
    fill_pages(
        cache.storage,
        shape.block_size,
        lambda slots: cache.fill(normal(len(slots), H, D, device), normal(len(slots), H, D, device), slots),
    )
    key, value = (normal(shape.context, H, D, device) for _ in range(2))
    cache.fill(key, value, slots_of(batch.tables[0][-1], 0, shape.context, shape.block_size))
    return key, value


def check_last(batch: Batch, shape: Shape, key: Tensor, value: Tensor, call: Call, rows: int = 16) -> float:
    """Error of the last queries of the last request, whose keys and values are given, after one call."""
    batch.out.fill_(float("nan"))
    call()
    rows = min(rows, shape.query_len)
    exact = exact_attention(batch.query[-rows:], key, value, shape.scale)
    return relative_error(batch.out[-rows:], exact)


def _check_write(job: Job, key: Tensor, value: Tensor, device: Device) -> float:
    """Store the tokens as one request, by the timed writer, and let the peer's own attention read them back."""
    tokens = job.query_len
    at = Shape(*job.heads, job.head_dim, 1, tokens, 1, job.block_size)
    batch = make_batch(at, 1, device.name)
    cache = open_cache(job.kernel, job.preset, at, batch.num_blocks, device.name)
    cache.write(key, value, slots_of(batch.tables[0][0], 0, tokens, job.block_size))
    attend = cache.attention(batch, at)
    return check_last(batch, at, key, value, partial(attend, batch.tables[0]))
