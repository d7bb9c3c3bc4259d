# SPDX-License-Identifier: Apache-2.0
"""Our kernels as jobs: decode attention with the times of its launches, and the cache write.

In: a job. Out: ``Prepared`` calls with a check against ``codec.reference``. Kernels are called here and in
``kernels_prefill`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvsplice.bench.kernels_data import (
    Batch,
    Call,
    Prepared,
    Shape,
    fill_pages,
    make_batch,
    normal,
    num_copies,
    relative_error,
    write_slots,
)
from vllm_kvsplice.bench.kernels_jobs import Job
from vllm_kvsplice.bench.kernels_timing import Device
from vllm_kvsplice.codec import reference
from vllm_kvsplice.codec.layout import PREFERRED_BLOCK_SIZE, LatentLayout, Side, Tier

WIDE = torch.bfloat16
# Outputs are bf16 (2**-9 = 0.2 %) and dots fp16 or better; a lost tile or a wrong scale costs 4 % and more.
ATTENTION_TOLERANCE = 1e-2
# Error beyond the reference's own rounding to codes, over the latents' norm: what bf16 arithmetic would add.
WRITE_TOLERANCE = 4e-3
CHECKED_TOKENS = 256


@dataclass(frozen=True)
class Codec:
    """A layout and random bases of its sizes."""

    layout: LatentLayout
    k_encode: Tensor
    k_decode: Tensor
    k_mean: Tensor
    v_encode: Tensor
    v_decode: Tensor
    v_mean: Tensor
    prepared: Any  # kvsplice_kernels.encode.Prepared, as made when weights are loaded

    def plans(self, block_size: int) -> tuple[Any, Any]:
        """Plans of K and V."""
        return self.layout.plans(block_size)

    def make_cache(self, num_blocks: int, num_kv_heads: int, block_size: int, device: str) -> Tensor:
        """[num_blocks, num_kv_heads, block_size, C] uint8 zeros."""
        shape = num_blocks, num_kv_heads, block_size, self.layout.bytes_per_token_head
        return torch.zeros(shape, dtype=torch.uint8, device=device)


def make_codec(layout: LatentLayout, num_kv_heads: int, device: str) -> Codec:
    """Random orthogonal bases with a mean; the identity without one where a side is 16-bit throughout."""
    from kvsplice_kernels.encode import prepare
    from kvsplice_kernels.row_operands import in_columns

    torch.manual_seed(2)
    head_dim = layout.head_dim
    tensors: list[Tensor] = []
    sides: tuple[Side, ...] = ("k", "v")
    for side in sides:
        full = torch.linalg.qr(torch.randn(num_kv_heads, head_dim, head_dim))[0]
        mean = torch.randn(num_kv_heads, head_dim) * 0.1
        if layout.tiers(side) == (Tier(16, head_dim),):
            full, mean = torch.eye(head_dim).repeat(num_kv_heads, 1, 1), torch.zeros_like(mean)
        encode = full[:, : layout.rank(side)].contiguous()
        tensors += [encode, encode.transpose(1, 2).contiguous(), mean]
    k_encode, k_decode, k_mean, v_encode, v_decode, v_mean = (t.to(device) for t in tensors)
    prepared = prepare(k_encode, k_decode, k_mean, v_encode, v_decode, v_mean)
    prepared = in_columns(prepared, *layout.plans(PREFERRED_BLOCK_SIZE))
    return Codec(layout, k_encode, k_decode, k_mean, v_encode, v_decode, v_mean, prepared)


class DecodeData(NamedTuple):
    """Codes that the reference wrote, and the queries of a decode step."""

    codec: Codec
    cache: Tensor
    batch: Batch
    shape: Shape
    bytes: int  # of the cached tokens


def decode_data(job: Job, device: Device, copies: int | None) -> DecodeData:
    """What a decode job reads; pages for ``copies`` calls."""
    shape, codec = job.shape, make_codec(job.layout, job.heads[1], device.name)
    moved = shape.batch * shape.context * shape.num_kv_heads * codec.layout.bytes_per_token_head
    batch = make_batch(shape, copies or num_copies(moved, device.cold_bytes), device.name)
    cache = codec.make_cache(batch.num_blocks, shape.num_kv_heads, shape.block_size, device.name)
    fill_pages((cache,), shape.block_size, lambda slots: write_random_latents(codec, cache, slots))
    return DecodeData(codec, cache, batch, shape, moved)


def decode_calls(data: DecodeData, splits: int, launch: Any) -> list[Call]:
    """The step once for every block table; ``launch`` None: the kernel's default."""
    from kvsplice_kernels import attention

    codec, cache, batch, shape, _ = data
    ranks = attention.latent_ranks(*codec.plans(shape.block_size), launch)
    shapes = attention.workspace_shapes(shape.num_queries, shape.num_heads, *ranks, splits)
    work = attention.Workspace(*(torch.empty(s, dtype=torch.float32, device=cache.device) for s in shapes))
    return [partial(attend, codec, cache, batch, shape, table, splits, work, launch) for table in batch.tables]


def decode(job: Job, device: Device, copies: int | None) -> Prepared:
    """Attention of a decode step over codes that the reference wrote."""
    from kvsplice_kernels.attention import choose_num_splits
    from vllm_kvsplice.launch import tuned

    data = decode_data(job, device, copies)
    shape, group = data.shape, job.heads[0] // job.heads[1]
    launch = job.launch or tuned(data.codec.layout, group, shape.query_len, data.cache.device)
    splits = job.num_splits or choose_num_splits(shape.batch, shape.num_kv_heads, shape.context, device.num_sms, launch)
    calls = decode_calls(data, splits, launch)
    return Prepared(
        calls,
        lambda: decode_error(data, calls[0], last_request(data)),
        ATTENTION_TOLERANCE,
        data.bytes,
        splits,
        stages=_stages(calls, data.cache, data.bytes),
    )


def attend(
    codec: Codec,
    cache: Tensor,
    batch: Batch,
    shape: Shape,
    table: Tensor,
    num_splits: int,
    workspace: Any = None,
    launch: Any = None,
) -> None:
    """One paged_attention call of the whole batch into batch.out."""
    from kvsplice_kernels import attention

    k_plan, v_plan = codec.plans(shape.block_size)
    attention.paged_attention(
        batch.query,
        cache,
        k_plan,
        v_plan,
        codec.prepared,
        table,
        batch.seq_lens,
        batch.query_start_loc,
        shape.scale,
        batch.out,
        shape.query_len,
        num_splits,
        workspace=workspace,
        launch=launch,
    )


def write_tokens(codec: Codec, cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """One cache_write call."""
    from kvsplice_kernels import cache_write

    cache_write.cache_write(key, value, cache, slots, codec.prepared, *codec.plans(cache.shape[2]), WIDE)


def write(job: Job, device: Device, copies: int | None) -> Prepared:
    """Cache write of ``query_len`` tokens, each call into other slots of a cache larger than L2; keys and values are warm."""
    shape, codec = job.shape, make_codec(job.layout, job.heads[1], device.name)
    cell = shape.num_kv_heads * codec.layout.bytes_per_token_head
    slots = write_slots(shape, cell, device.cold_bytes, copies, device.name)
    num_blocks = int(max(s.max() for s in slots)) // shape.block_size + 1
    cache = codec.make_cache(num_blocks, shape.num_kv_heads, shape.block_size, device.name)
    key, value = (normal(shape.query_len, shape.num_kv_heads, shape.head_dim, device.name) for _ in range(2))
    calls: list[Call] = [partial(write_tokens, codec, cache, key, value, s) for s in slots]
    moved = shape.query_len * (cell + 2 * key[0].nbytes)
    return Prepared(calls, lambda: _check_write(codec, cache, key, value, slots[0], calls[0]), WRITE_TOLERANCE, moved)


# ---------------------------------------------------------------- stages
def _stages(calls: list[Call], cache: Tensor, moved: int) -> dict[str, tuple[list[Call], int | None]]:
    """The launches that paged_attention makes, each with its tensors as recorded while every call ran once."""
    stages: dict[str, tuple[list[Call], int | None]] = {}
    for call in calls:
        for name, launch in _record(call):
            reads_cache = any(x is cache for x in launch.args)
            stages.setdefault(name, ([], moved if reads_cache else None))[0].append(launch)
    return stages


def _record(call: Call) -> list[tuple[str, partial[None]]]:
    from kvsplice_kernels.dispatch import Bound

    seen: list[tuple[str, partial[None]]] = []
    launch = Bound.__call__

    def record(bound: Bound, *tensors: Tensor) -> None:
        seen.append((bound.launch[0].__name__.removesuffix("_kernel"), partial(launch, bound, *tensors)))
        launch(bound, *tensors)

    Bound.__call__ = record
    try:
        call()
    finally:
        Bound.__call__ = launch
    return seen


# ---------------------------------------------------------------- checks
def write_random_latents(codec: Codec, cache: Tensor, slots: Tensor) -> None:
    k_plan, v_plan = codec.plans(cache.shape[2])
    for plan, rank in ((k_plan, codec.layout.rank("k")), (v_plan, codec.layout.rank("v"))):
        z = torch.randn(len(slots), cache.shape[1], rank, device=cache.device)
        reference.write_side(cache, z, plan, slots, WIDE)


def last_request(data: DecodeData) -> Tensor:
    """The exact attention of the last request over the first block table, fp64."""
    return latent_reference(data.codec, data.cache, data.batch, data.shape, data.shape.query_len)


def decode_error(data: DecodeData, call: Call, exact: Tensor) -> float:
    """Relative error of what a call over the first block table wrote for the last request."""
    data.batch.out.fill_(float("nan"))
    call()
    return relative_error(data.batch.out[-data.shape.query_len :], exact)


def latent_reference(codec: Codec, cache: Tensor, batch: Batch, shape: Shape, rows: int) -> Tensor:
    """The reference's attention of the last ``rows`` queries of the last request to codes alone, fp64."""
    return reference.paged_attention(
        batch.query[-rows:],
        cache,
        codec.layout,
        codec.k_decode,
        codec.k_mean,
        codec.v_decode,
        codec.v_mean,
        batch.tables[0][-1:],
        batch.seq_lens[-1:],
        torch.tensor([0, rows], dtype=torch.int32, device=batch.query.device),
        shape.scale,
        wide_dtype=WIDE,
    )


def _check_write(codec: Codec, cache: Tensor, key: Tensor, value: Tensor, slots: Tensor, call: Call) -> float:
    """How much farther the cache is from the exact latents than the reference's codes are, of the worse side."""
    call()
    worst = 0.0
    block, row = slots[:CHECKED_TOKENS] // cache.shape[2], slots[:CHECKED_TOKENS] % cache.shape[2]
    k_plan, v_plan = codec.plans(cache.shape[2])
    sides = (("k", key, codec.k_encode, codec.k_mean, k_plan), ("v", value, codec.v_encode, codec.v_mean, v_plan))
    for side, x, encode, mean, plan in sides:
        exact = reference.encode(x[:CHECKED_TOKENS].double(), encode.double(), mean.double())
        codes = reference.roundtrip(exact, codec.layout, "k" if side == "k" else "v", WIDE)
        pages = reference.read_side(cache, plan, block, torch.float64, WIDE).unflatten(1, (-1, cache.shape[2]))
        stored = pages[:, torch.arange(len(row), device=row.device), row].transpose(0, 1)
        worst = max(worst, relative_error(stored, exact) - relative_error(codes, exact))
    return worst
