# SPDX-License-Identifier: Apache-2.0
"""Orthogonal bases for latents: fixed rotations, and those solved from calibration moments."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
