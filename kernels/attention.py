# SPDX-License-Identifier: Apache-2.0
"""Attention of a batch over its compressed pages: project_query, decode and reduce_expand, one after another.

In: queries, pages, bases. Out: the attention output. Meaning: reference.paged_attention. With a workspace given,
nothing is allocated and nothing waits for the GPU, so that a CUDA graph can hold it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvsplice_kernels.decode import TILE, bind_decode, latent_ranks
from kvsplice_kernels.dispatch import Bound, launcher
from kvsplice_kernels.encode import Prepared
from kvsplice_kernels.launch import PROGRAMS, Launch, has_rows
from kvsplice_kernels.plan import Plan
from kvsplice_kernels.project_query import bind_project
from kvsplice_kernels.reduce_expand import bind_reduce

MOST_SPLITS = 512


class Workspace(NamedTuple):
    """fp32 scratch of one call: T tokens, num_splits splits."""

    q_latent: Tensor  # [T, num_heads, k_rank]
    q_bias: Tensor  # [T, num_heads]
    latent: Tensor  # [T, num_heads, num_splits, v_rank]
    lse: Tensor  # [T, num_heads, num_splits]


class BoundAttention(NamedTuple):
    """Attention of tensors like those that it was bound for, in its workspace."""

    project: Bound | None  # None: the workspace holds the queries already
    decode: Bound
    reduce: Bound
    work: Workspace
    rows: bool  # queries are rows: prepared's columns are read

    def __call__(
        self,
        query: Tensor,
        kv_cache: Tensor,
        prepared: Prepared,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        out: Tensor,
    ) -> None:
        q_latent, q_bias, latent, lse = self.work
        k_decode, v_decode = prepared.decodes(self.rows)
        if self.project is not None:
            self.project(query, k_decode, prepared.k_mean, q_latent, q_bias)
        self.decode(q_latent, q_bias, kv_cache, block_table, seq_lens, query_start_loc, latent, lse)
        self.reduce(latent, lse, v_decode, prepared.v_mean, seq_lens, query_start_loc, out)


def workspace_shapes(
    num_tokens: int, num_heads: int, k_rank: int, v_rank: int, num_splits: int
) -> tuple[tuple[int, ...], ...]:
    """Shapes of a Workspace's tensors in order; all are contiguous fp32."""
    rows = (num_tokens, num_heads)
    return (*rows, k_rank), rows, (*rows, num_splits, v_rank), (*rows, num_splits)


def choose_num_splits(
    num_reqs: int, num_kv_heads: int, max_seq_len: int, num_sms: int, launch: Launch | None = None
) -> int:
    """Splits of the keys so that at most ``launch.programs`` (None: PROGRAMS) programs of decode lie on each
    multiprocessor, in one wave, each with four tiles or more."""
    programs = launch.programs if launch else PROGRAMS
    wanted = programs * num_sms // max(1, num_reqs * num_kv_heads)
    return max(1, min(wanted, -(-max_seq_len // (4 * TILE)), MOST_SPLITS))


def bind_attention(
    query: Tensor,
    kv_cache: Tensor,
    k_plan: Plan,
    v_plan: Plan,
    prepared: Prepared,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    out: Tensor,
    max_query_len: int,
    num_splits: int = 1,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    wide_dtype: torch.dtype = torch.bfloat16,
    skip_first_chunks: bool = False,
    workspace: Workspace | None = None,
    projected: bool = False,
    launch: Launch | None = None,
) -> tuple[BoundAttention, tuple[Any, ...]]:
    """Attention over compressed pages that already hold this step's tokens, writing into ``out``.

    Args:
        query: [T, num_heads, head_dim], requests one after another as ``query_start_loc`` [B + 1] int32 says.
        kv_cache: [num_blocks, H, block_size, C] uint8. k_plan, v_plan: LatentLayout.plan("k" | "v", block_size).
        prepared: the bases, of encode.prepare, and of row_operands.in_columns where ``launch`` has queries as rows.
        block_table: [B, max_blocks] int32. seq_lens: [B] int32, new tokens included.
        out: [>= T, num_heads, head_dim]. Rows that see no key become 0; rows of no request are not written.
        max_query_len: upper bound of the requests' query tokens. num_splits: splits of the keys, see choose_num_splits.
        scale: softmax scale, positive.
        sliding_window: a query sees keys at distance < sliding_window. soft_cap: logits become cap * tanh(logit / cap).
        wide_dtype: of 16-bit tiers.
        skip_first_chunks: leave requests with seq_len == query_len, which another path serves, untouched in ``out``.
        workspace: scratch; allocated here if None. projected: its q_latent and q_bias hold the queries already, of
            write_and_project. launch: of decode, the one that ``num_splits`` was chosen for; None: its default.
    Returns:
        The launches for tensors of these shapes and strides, and these, in the order that they take.
    Raises:
        ValueError: a tensor has the wrong dtype, shape or strides.
    """
    num_tokens, num_heads, _ = query.shape
    if workspace is None:
        shapes = workspace_shapes(num_tokens, num_heads, *latent_ranks(k_plan, v_plan, launch), num_splits)
        workspace = Workspace(*(torch.empty(s, dtype=torch.float32, device=query.device) for s in shapes))
    q_latent, q_bias, latent, lse = workspace
    rows = has_rows(launch)
    k_decode, v_decode = prepared.decodes(rows)
    bound = BoundAttention(
        None if projected else bind_project(query, k_decode, prepared.k_mean, q_latent, q_bias, early=not rows)[0],
        bind_decode(
            q_latent, q_bias, kv_cache, k_plan, v_plan, block_table, seq_lens, query_start_loc, latent, lse, scale,
            max_query_len, sliding_window, soft_cap, wide_dtype, skip_first_chunks, launch,
        )[0],
        bind_reduce(
            latent, lse, v_decode, prepared.v_mean, seq_lens, query_start_loc, out, max_query_len,
            skip_first_chunks,
        )[0],
        workspace,
        rows,
    )  # fmt: skip
    return bound, (query, kv_cache, prepared, block_table, seq_lens, query_start_loc, out)


paged_attention = launcher(bind_attention)
