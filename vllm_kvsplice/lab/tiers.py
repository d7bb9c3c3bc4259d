# SPDX-License-Identifier: Apache-2.0
"""Latents in tiers of any width, as the laboratory needs them: those of the cache format, and 3 bits, which it has not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvsplice.codec import reference

# (bits, dims) in falling order of bits; dimensions that they leave are dropped.
Tiers = Sequence[tuple[int, int]]
CLIP_STEPS = 8  # scales tried below the covering one, as 2 bits have


def latent_bytes(tiers: Tiers) -> float:
    """All-in bytes of one token's latent: codes, and one scale byte for each tier below 16 bits."""
    return sum(dims * bits / 8 + (bits < 16) for bits, dims in tiers if bits)


def read(z: Tensor, tiers: Tiers) -> Tensor:
    """Latents [..., rank] as a reader of the cache would see them; ``tiers`` add up to rank."""
    kept = [(bits, dims) for bits, dims in tiers if bits]
    parts = z.split([dims for _, dims in kept], dim=-1)
    return torch.cat([_tier(part, bits) for (bits, _), part in zip(kept, parts, strict=True)], dim=-1)


def _tier(z: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return z.bfloat16().to(z.dtype)
    return three_bits(z) if bits == 3 else reference.dequantize(*reference.quantize(z, bits), bits, z.dtype)


def three_bits(z: Tensor) -> Tensor:
    """Rows [..., dims] in 8 levels, -3.5 to 3.5 scales, with the scale byte of least squared error, as ``reference.quantize``."""
    covers = reference.scale_code(z.abs().amax(-1) / 3.5).to(torch.int32)
    best, least = torch.zeros_like(z), z.new_full(z.shape[:-1], torch.inf)
    for step in range(CLIP_STEPS):
        scale = reference.scale_of((covers - step).clamp_min(0).to(torch.uint8), z.dtype)[..., None]
        tried = ((z / scale + 3.5).round().clamp(0, 7) - 3.5) * scale
        error = (tried - z).square().sum(-1)
        best, least = torch.where((error < least)[..., None], tried, best), torch.minimum(error, least)
    return best
