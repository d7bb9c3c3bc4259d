# SPDX-License-Identifier: Apache-2.0
"""A layer's bases as the kernels want them: every matrix as two bf16 planes, for tensor cores, and E mu.

In: encode, decode and mean of a layer, fp32. Out: ``Prepared``, made once when weights are loaded, read by cache_write,
project_query, write_and_project and reduce_expand in every step. Plain torch: it needs no Triton.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Prepared(NamedTuple):
    """Tensors of the kernels, contiguous. A split matrix has the planes (high, low) on its second axis."""

    k_encode: Tensor  # [H, 2, k_rank, head_dim] bf16
    k_offset: Tensor  # [H, k_rank] fp32
    v_encode: Tensor  # [H, 2, v_rank, head_dim] bf16
    v_offset: Tensor  # [H, v_rank] fp32
    k_decode: Tensor  # [H, 2, k_rank, head_dim] bf16, the transpose of D
    k_mean: Tensor  # [H, head_dim] fp32
    v_decode: Tensor  # [H, 2, head_dim, v_rank] bf16
    v_mean: Tensor  # [H, head_dim] fp32
    # The same planes of k_decode and v_decode in the order of columns that launches with queries as rows have, see
    # row_operands.in_columns, which makes them.
    k_columns: Tensor | None = None  # [H, 2, columns, head_dim] bf16
    v_columns: Tensor | None = None  # [H, 2, head_dim, columns] bf16

    def decodes(self, rows: bool) -> tuple[Tensor, Tensor]:
        """k_decode and v_decode for a launch with queries as ``rows``, or without, shapes as above with its columns for the
        rank; raises ValueError where they were not made."""
        k, v = (self.k_columns, self.v_columns) if rows else (self.k_decode, self.v_decode)
        if k is None or v is None:
            raise ValueError("prepared: expected bases of row_operands.in_columns for a launch with queries as rows")
        return k, v

    def of_a_step(self, rows: bool) -> tuple[Tensor, ...]:
        """What write_and_project reads, in its order; ``rows``, and what is raised, as in ``decodes``."""
        return *self[:4], self.decodes(rows)[0], self.k_mean  # type: ignore[return-value]


def split(matrix: Tensor) -> Tensor:
    """[H, rows, cols] fp32 -> [H, 2, rows, cols] bf16 planes, whose sum is the matrix up to 2**-16 of each element."""
    high = matrix.to(torch.bfloat16)
    return torch.stack([high, (matrix - high.to(matrix.dtype)).to(torch.bfloat16)], dim=1)


def offset(planes: Tensor, mean: Tensor) -> Tensor:
    """E mu [H, rank] fp32 of split planes and mean [H, head_dim].

    Of the split E, not of E: with it Ex - E mu is exactly E(x - mu) for an E that is off by 2**-16, and a mean that is far
    larger than the spread around it costs no accuracy but that of the sum in fp32.
    """
    return torch.einsum("hprd,hd->hr", planes.double(), mean.double()).float()


def prepare(
    k_encode: Tensor, k_decode: Tensor, k_mean: Tensor, v_encode: Tensor, v_decode: Tensor, v_mean: Tensor
) -> Prepared:
    """Make the tensors that the kernels read.

    Args:
        k_encode, v_encode: [H, rank, head_dim]; k_decode, v_decode: [H, head_dim, rank]; k_mean, v_mean: [H, head_dim];
            fp32.
    """
    k_planes, v_planes = split(k_encode), split(v_encode)
    return Prepared(
        k_planes,
        offset(k_planes, k_mean),
        v_planes,
        offset(v_planes, v_mean),
        split(k_decode.transpose(1, 2)).contiguous(),
        k_mean,
        split(v_decode),
        v_mean,
    )
