# SPDX-License-Identifier: Apache-2.0
"""What every measured kernel is made of: a shape, shuffled block tables, random keys and values, the exact answer.

In: a shape. Out: tensors for ``kernels_ours`` and ``peers``, and ``Prepared``, the calls that ``kernels`` checks and times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], None]
FILL_TOKENS = 65536  # random tokens that are written before the rest of a cache becomes copies of their pages
PREFILL_TOKENS = 1024  # of a write, from which on they are taken for a prefill's
MAX_COPIES = 64  # calls in one CUDA graph, each on other pages


@dataclass(frozen=True)
class Shape:
    """A batch over a paged cache: ``batch`` requests of ``context`` tokens each, the last ``query_len`` of them new."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int
    context: int
    query_len: int
    block_size: int

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return float(self.head_dim**-0.5)

    @property
    def blocks_per_request(self) -> int:
        """Pages of one request."""
        return -(-self.context // self.block_size)

    @property
    def num_queries(self) -> int:
        """Query tokens of the batch."""
        return self.batch * self.query_len


class Batch(NamedTuple):
    """The tensors of a step that do not depend on how the cache is stored."""

    tables: list[Tensor]  # one for each call: [batch, blocks_per_request] int32, all blocks distinct and shuffled
    seq_lens: Tensor  # [batch] int32, new tokens included
    query_start_loc: Tensor  # [batch + 1] int32
    query: Tensor  # [num_queries, num_heads, head_dim] bf16
    out: Tensor  # like query, NaN

    @property
    def num_blocks(self) -> int:
        """Blocks of all tables."""
        return sum(table.numel() for table in self.tables)


@dataclass
class Prepared:
    """One kernel ready to be checked and timed. The calls do the same work, each on other pages.

    ``check`` runs the first call and returns its error, which ``tolerance`` bounds. ``bytes``: what one call has to
    move at least. ``stages``: launches that a call is made of, by name, with their own bytes where they read the cache.
    """

    calls: list[Call]
    check: Callable[[], float]
    tolerance: float
    bytes: int
    num_splits: int | None = None
    graph: bool = True
    stages: dict[str, tuple[list[Call], int | None]] = field(default_factory=dict)


class OpenCache(NamedTuple):
    """A paged cache of one format, and what its engine does with it.

    ``write``(key, value, slots) stores [T, num_kv_heads, head_dim] tokens as served; ``fill`` does it any way.
    ``attention``(batch, shape) returns a function of one block table that attends batch.query into batch.out.
    """

    storage: tuple[Tensor, ...]  # first axis: blocks
    fill: Callable[[Tensor, Tensor, Tensor], None]
    write: Callable[[Tensor, Tensor, Tensor], None]
    attention: Callable[[Batch, Shape], Callable[[Tensor], None]]
    tolerance: float  # relative error of attention over random data: the format's own, and no more
    num_splits: int | None = None


def num_copies(bytes_each: int, cold_bytes: float, most: int = MAX_COPIES) -> int:
    """Copies of a cache that together exceed ``cold_bytes``, several times a GPU's L2."""
    return max(1, min(most, math.ceil(cold_bytes / max(1, bytes_each))))


def make_batch(shape: Shape, copies: int, device: str) -> Batch:
    """Block tables and queries; normal numbers, seeded."""
    torch.manual_seed(1)
    blocks = copies * shape.batch * shape.blocks_per_request
    shuffled = torch.randperm(blocks, device=device).int().view(copies, shape.batch, shape.blocks_per_request)
    tables = [table.clone() for table in shuffled]  # each aligned as vLLM's own is: alignment is a variant to Triton
    lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.query_len
    query = normal(shape.num_queries, shape.num_heads, shape.head_dim, device)
    return Batch(tables, lens, starts, query, torch.full_like(query, float("nan")))


def normal(num_tokens: int, heads: int, head_dim: int, device: str) -> Tensor:
    """[num_tokens, heads, head_dim] normal numbers, bf16."""
    return torch.randn(num_tokens, heads, head_dim, device=device).bfloat16()


def slots_of(table: Tensor, first: int, last: int, block_size: int) -> Tensor:
    """Slots [last - first] int64 of the positions [first, last) of the request whose block table row is given."""
    position = torch.arange(first, last, device=table.device)
    return table[position // block_size].long() * block_size + position % block_size


def write_slots(shape: Shape, cell: int, cold_bytes: float, copies: int | None, device: str) -> list[Tensor]:
    """Slots [query_len] int64 for each call of a cache write, no two the same, in a cache of ``cell`` bytes per token.

    Whole shuffled blocks where the tokens are a prefill's, scattered over ``cold_bytes`` where they are a decode step's.
    """
    tokens = shape.query_len
    calls = copies or num_copies(tokens * cell, cold_bytes)
    if tokens >= PREFILL_TOKENS:
        tables = make_batch(shape, calls, device).tables
        return [slots_of(table[0], 0, tokens, shape.block_size) for table in tables]
    pool = calls * tokens if copies else max(calls * tokens, int(cold_bytes / cell))
    shuffled = torch.randperm(pool, device=device)[: calls * tokens].view(calls, tokens)
    return [slots.clone() for slots in shuffled]


def fill_pages(storage: tuple[Tensor, ...], block_size: int, write: Callable[[Tensor], None]) -> None:
    """Fill every block: ``write``(slots) puts random tokens into the first FILL_TOKENS, the rest become copies of them."""
    num_blocks, device = storage[0].shape[0], storage[0].device
    filled = min(num_blocks, FILL_TOKENS // block_size)
    write(torch.arange(filled * block_size, device=device))
    for tensor in storage:
        for start in range(filled, num_blocks, filled):
            n = min(filled, num_blocks - start)
            tensor[start : start + n].copy_(tensor[:n])


def exact_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention in fp64: query [T, num_heads, D] at the last T of the positions of key and value [S, H, D]."""
    T, S, H = query.shape[0], key.shape[0], key.shape[1]
    q, k, v = query.double().unflatten(1, (H, -1)), key.double(), value.double()
    logits = torch.einsum("thgd,shd->thgs", q, k) * scale
    position = torch.arange(S, device=query.device)
    later = position[None, :] > position[S - T :, None]
    p = torch.softmax(logits.masked_fill(later[:, None, None, :], float("-inf")), dim=-1)
    return torch.einsum("thgs,shd->thgd", p, v).flatten(1, 2)


def relative_error(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact| in the Frobenius norm; infinite where ``out`` is not finite."""
    error = ((out.double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf
