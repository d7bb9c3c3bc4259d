# SPDX-License-Identifier: Apache-2.0
"""Uniform quantisation between a group's least and greatest element, shared by the codecs that store a scale and a zero point."""

from __future__ import annotations

from torch import Tensor

PAIR_BYTES = 4  # scale and zero point, fp16 each
TINY = 1e-8


def affine(x: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise the last axis as one group: x [..., n] -> fp32 [..., n].

    2**bits levels from the minimum to the maximum; scale and minimum are stored in fp16 and codes rounded with what was
    stored, so decoding knows nothing more.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp_min(TINY).half().float().clamp_min(2.0**-24)  # fp16's least positive number
    zero = low.half().float()
    return ((x - zero) / scale).round().clamp(0, top) * scale + zero


def grouped(x: Tensor, bits: int, group_size: int) -> Tensor:
    """``affine`` on runs of ``group_size`` elements of the last axis, which it must divide."""
    return affine(x.unflatten(-1, (-1, group_size)), bits).flatten(-2)


def group_bytes(elements: float, bits: int, group_size: int) -> float:
    """Codes and (scale, zero point) pairs of ``elements`` elements in groups of ``group_size``."""
    return elements * (bits / 8 + PAIR_BYTES / group_size)
