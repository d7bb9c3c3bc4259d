# SPDX-License-Identifier: Apache-2.0
"""Second moments of keys, values and queries, streamed: fp64, and no more memory for more text.

In: one layer's q, k, v after RoPE, batch after batch. Out: ``Moments`` per layer, from which ``bases`` solves encoder
and decoder. All functions are pure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over tokens, fp64, of one layer with H KV heads."""

    tokens: int
    k_sum: Tensor  # [H, head_dim]
    k_outer: Tensor  # [H, head_dim, head_dim], sum of k k^T
    v_sum: Tensor  # [H, head_dim]
    v_outer: Tensor  # [H, head_dim, head_dim], sum of v v^T
    q_outer: Tensor  # [H, head_dim, head_dim], sum of q q^T over tokens and over the query heads that read the KV head


def new_moments(num_kv_heads: int, head_dim: int, device: torch.device | str = "cpu") -> Moments:
    """Moments of no tokens."""
    row = torch.zeros(num_kv_heads, head_dim, dtype=torch.float64, device=device)
    square = torch.zeros(num_kv_heads, head_dim, head_dim, dtype=torch.float64, device=device)
    return Moments(0, row, square, row, square, square)


def add_batch(moments: Moments, q: Tensor, k: Tensor, v: Tensor) -> Moments:
    """Moments with the tokens of a batch added.

    Args:
        q: [B, num_heads, T, head_dim], query head h reading KV head h // (num_heads // H); k, v: [B, H, T, head_dim].
    """
    B, H, T, head_dim = k.shape
    groups = q.unflatten(1, (H, -1)).transpose(0, 1).flatten(1, 3)  # [H, B * group * T, head_dim]
    k, v = (x.transpose(0, 1).flatten(1, 2).double() for x in (k, v))
    batch = Moments(B * T, k.sum(1), _outer(k), v.sum(1), _outer(v), _outer(groups.double()))
    return merge(moments, batch)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the tokens of both."""
    return Moments(a.tokens + b.tokens, *(x + y for x, y in zip(a[1:], b[1:], strict=True)))


def mean(total: Tensor, tokens: int) -> Tensor:
    """Mean [H, head_dim] from a sum over ``tokens`` tokens."""
    return total / tokens


def covariance(total: Tensor, outer: Tensor, tokens: int) -> Tensor:
    """Covariance [H, head_dim, head_dim] from a sum and a sum of outer products over ``tokens`` tokens."""
    mu = mean(total, tokens)
    return _symmetric(outer / tokens - mu[:, :, None] * mu[:, None, :])


def _outer(x: Tensor) -> Tensor:
    return x.transpose(1, 2) @ x


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.transpose(1, 2)) / 2
