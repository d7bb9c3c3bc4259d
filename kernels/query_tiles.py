# SPDX-License-Identifier: Apache-2.0
"""Which request and which of its query tokens a program serves, from query_start_loc alone, on a grid fixed by the host.

Requests of any query length are cut into tiles of ``tile_tokens`` tokens; decode and reduce_expand share this file.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def num_query_tiles(num_tokens: int, num_reqs: int, max_query_len: int, tile_tokens: int) -> int:
    """Programs that cover every tile of every request; an upper bound where one request may have several tiles."""
    return num_reqs if max_query_len <= tile_tokens else num_tokens // tile_tokens + num_reqs


@triton.jit
def find_tile(index, query_start_loc_ptr, num_reqs, tile_tokens, ONE_TILE: tl.constexpr):
    """Program index -> (request, first token of the tile within it).

    ONE_TILE: no request has more than one tile, index is the request. Else request b owns the indices from
    query_start_loc[b] // tile_tokens + b on, found by bisection; indices past its last tile start past its tokens.
    """
    if ONE_TILE:
        return index, index * 0
    else:
        low, high = index * 0, index * 0 + num_reqs
        while high - low > 1:
            middle = (low + high) // 2
            first = tl.load(query_start_loc_ptr + middle) // tile_tokens + middle
            if first <= index:
                low = middle
            else:
                high = middle
        first = tl.load(query_start_loc_ptr + low) // tile_tokens + low
        return low, (index - first) * tile_tokens


@triton.jit
def request_lens(request, query_start_loc_ptr, seq_lens_ptr):
    """(first row of the request in the batch, its query tokens, its sequence length with them)."""
    start = tl.load(query_start_loc_ptr + request)
    return start, tl.load(query_start_loc_ptr + request + 1) - start, tl.load(seq_lens_ptr + request)


def check_requests(block_table: Tensor | None, seq_lens: Tensor, query_start_loc: Tensor) -> int:
    """Number of requests; raises ValueError on wrong dtypes or shapes."""
    for name, tensor, dim in (("seq_lens", seq_lens, 1), ("query_start_loc", query_start_loc, 1)):
        if tensor.dtype != torch.int32 or tensor.dim() != dim or tensor.stride(0) != 1:
            raise ValueError(
                f"{name}: expected contiguous int32 with {dim} axis, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    num_reqs = seq_lens.shape[0]
    if query_start_loc.shape[0] != num_reqs + 1:
        raise ValueError(f"query_start_loc: expected {num_reqs + 1} entries, got {query_start_loc.shape[0]}")
    if block_table is not None:
        if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.stride(1) != 1:
            raise ValueError(f"block_table: expected int32 rows, got {block_table.dtype} {tuple(block_table.shape)}")
        if block_table.shape[0] < num_reqs:
            raise ValueError(f"block_table: expected {num_reqs} rows, got {block_table.shape[0]}")
    return num_reqs
