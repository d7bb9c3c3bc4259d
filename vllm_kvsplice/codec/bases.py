# SPDX-License-Identifier: Apache-2.0
"""Orthogonal bases for latents: fixed rotations, and those solved from calibration moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Equalise = Literal["gamma", "rotate", "sigma", "none"]
EQUALISE: tuple[Equalise, ...] = get_args(Equalise)
IDENTITY_SHARE = 0.1
# Least variance that a latent is scaled by, so that a direction calibration hardly saw does not become huge elsewhere:
TIER_FLOOR = 1e-4  # of its tier's mean
HEAD_FLOOR = 1e-8  # of its head's mean
TINY = 1e-12  # absolute: a standard deviation of 1e-6 is not resolved by the model's 16-bit values


def hadamard(n: int) -> Tensor:
    """An orthogonal [n, n] fp64 matrix that spreads any one coordinate over all n.

    Sylvester's Hadamard matrix of the largest power of two in n, times (Kronecker) the orthonormal DCT-II of the odd
    rest, so that every n has one; a pure Hadamard matrix where n is a power of two.
    """
    odd = n
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix) / math.sqrt(2)
        odd //= 2
    k = torch.arange(odd, dtype=torch.float64)
    dct = torch.cos(math.pi / odd * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / odd)
    dct[0] /= math.sqrt(2)
    return torch.kron(matrix, dct)


class Solution(NamedTuple):
    """A basis in fp64, in projector.Basis's order: x ~ decode (sigma * z) + mean with z = encode (x - mean) / sigma."""

    encode: Tensor  # [H, rank, head_dim]
    decode: Tensor  # [H, head_dim, rank]
    mean: Tensor  # [H, head_dim]
    sigma: Tensor  # [H, rank]


def blend(metric: Tensor, share: float = IDENTITY_SHARE) -> Tensor:
    """A second moment [H, d, d] scaled to trace d, plus ``share`` times the identity: positive definite."""
    d = metric.shape[-1]
    trace = metric.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(TINY)
    scaled: Tensor = metric * (d / trace)[:, None, None]
    return scaled + share * torch.eye(d, dtype=metric.dtype, device=metric.device)


def output_metric(weight: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """What an error of V costs in the attention layer's output: W_o^T W_o summed over the query heads of a KV head.

    weight: [hidden, num_heads * head_dim], query head h reading KV head h // (num_heads // num_kv_heads). Returns fp64
    [num_kv_heads, head_dim, head_dim].
    """
    heads: Tensor = weight.double().unflatten(1, (num_kv_heads, -1, head_dim)).permute(1, 2, 0, 3).flatten(1, 2)
    return heads.transpose(1, 2) @ heads


def principal(covariance: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The encoder and decoder that lose least in a metric, for every number of kept leading rows.

    The loss of x^ = D E x (x centred, covariance C) is E |x^ - x|_M^2 = E (x^ - x)^T M (x^ - x). With y = M^(1/2) x it is
    the plain loss of y, whose best r-dimensional projector is U_r U_r^T, U the eigenvectors of M^(1/2) C M^(1/2) in
    falling order (Eckart-Young). So E = U^T M^(1/2) and D = M^(-1/2) U: E D = 1, D E is a projector, and an error e of
    the latent costs exactly |e|^2. Without a metric M = 1: plain PCA, D = E^T.

    Args:
        covariance, metric: [H, d, d]; metric positive definite or None.
    Returns:
        encode [H, d, d], decode [H, d, d] and the latents' variances [H, d], falling.
    """
    if metric is None:
        values, U = _eigh_falling(covariance)
        return U.transpose(1, 2), U, values
    weights, W = torch.linalg.eigh(metric)
    root = (W * weights.sqrt()[:, None, :]) @ W.transpose(1, 2)
    inverse_root = (W * weights.rsqrt()[:, None, :]) @ W.transpose(1, 2)
    values, U = _eigh_falling(root @ covariance @ root)
    return U.transpose(1, 2) @ root, inverse_root @ U, values


def solve(
    mean: Tensor,
    covariance: Tensor,
    metric: Tensor | None,
    tiers: Sequence[tuple[int, int]],
    equalise: Equalise = "gamma",
) -> Solution:
    """The basis of one side of one layer.

    Args:
        mean: [H, d]; covariance, metric: [H, d, d], as in ``principal``.
        tiers: (bits, dims) in falling order of bits, adding up to d; dimensions of a 0-bit tier get no row.
        equalise: how the dimensions of a tier are made to share one scale, see ``_equalised``.
    """
    encode, decode, variance = principal(covariance, metric)
    variance = torch.maximum(variance, HEAD_FLOOR * variance.mean(-1, keepdim=True)).clamp_min(TINY)
    encodes, decodes, sigmas = [], [], []
    start = 0
    for bits, dims in tiers:
        if bits == 0:
            break
        part = slice(start, start + dims)
        e, d, s = _equalised(encode[:, part], decode[:, :, part], variance[:, part], "none" if bits == 16 else equalise)
        encodes.append(e)
        decodes.append(d)
        sigmas.append(s)
        start += dims
    return Solution(torch.cat(encodes, 1), torch.cat(decodes, 2), mean, torch.cat(sigmas, 1))


def _equalised(encode: Tensor, decode: Tensor, variance: Tensor, equalise: Equalise) -> tuple[Tensor, Tensor, Tensor]:
    """Equalised encoder [H, dims, d], decoder [H, d, dims] and sigma [H, dims] of one tier.

    With one step size per token and tier, rounding adds the same variance to every dimension of it.
    "rotate": a Hadamard rotation gives every dimension the tier's mean variance.
    "gamma": each dimension is first divided by its standard deviation to the power 1/2, then rotated. A uniform step
        on latents x_i / s_i costs  sum_i s_i^2 * mean_i(var_i / s_i^2)  in the metric, least at s_i^2 = std_i: then it is
        (sum std_i)^2 / dims, never more than sum var_i, which both s = 1 and s = std cost.
    "sigma": divided by the standard deviation, no rotation. "none": as it is.
    """
    std = torch.maximum(variance, TIER_FLOOR * variance.mean(-1, keepdim=True)).sqrt()
    one = torch.ones_like(std)
    if equalise == "none":
        return encode, decode, one
    if equalise == "sigma":
        return encode, decode, std
    weight = std.sqrt() if equalise == "gamma" else one
    weight = weight * (variance / weight.square()).mean(-1, keepdim=True).sqrt()  # latents of rms 1
    rotation = hadamard(encode.shape[1]).to(encode.device)
    return rotation @ (encode / weight[:, :, None]), (decode * weight[:, None, :]) @ rotation.T, one


def _eigh_falling(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (>= 0) [H, d] in falling order and eigenvectors [H, d, d] in columns, largest component positive."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1).clamp_min(0.0), vectors.flip(-1)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return values, vectors * largest.sign()
