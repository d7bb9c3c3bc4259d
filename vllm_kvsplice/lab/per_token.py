# SPDX-License-Identifier: Apache-2.0
"""Integers with one scale per token and KV head, as vLLM's ``int8_per_token_head`` and ``int4_per_token_head`` caches, and QServe's KV4.

int4 rotates with random signs and a Hadamard matrix first (QuaRot, arXiv 2404.00456) and hides its 4-bit zero point in the
low bits of the fp32 scale.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vllm_kvsplice.codec.bases import hadamard
from vllm_kvsplice.lab.affine import PAIR_BYTES, affine
from vllm_kvsplice.lab.codec import Attach, Codec, Setup, each_side, on_cache, same_bytes
from vllm_kvsplice.lab.dense import VLLM

SIGN_SEED = 0x9E3779B9  # vLLM's, so that its cache can be compared bit for bit
LEAST_SCALE = 1e-6
SMOOTH_EXPONENT = 0.5  # QServe's alpha


def int8_per_token_head(x: Tensor) -> Tensor:
    """Symmetric int8, scale amax / 127 in fp32, rounded half away from zero."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127.0).clamp_min(LEAST_SCALE)
    return _half_away(x * (1.0 / scale)).clamp(-128, 127) * scale


def int4_per_token_head(x: Tensor) -> Tensor:
    """Rotated, then 16 levels between the row's extremes with an integer zero point in 0..15; rotated back."""
    rotation = _rotation(x.shape[-1], x.device)
    z = (x.float() @ rotation.T).to(x.dtype).float()
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    scale = ((high - low) / 15.0).clamp_min(LEAST_SCALE)
    zero = _half_away(-low / scale).clamp(0, 15)
    codes = _half_away(z * (1.0 / scale) + zero).clamp(0, 15)
    stored = (scale.view(torch.int32) & -16).view(torch.float32)  # the zero point takes the low 4 bits
    return ((codes - zero) * stored) @ rotation / _block(x.shape[-1])


@lru_cache(maxsize=16)
def _rotation(dims: int, device: torch.device) -> Tensor:
    """Hadamard matrix times random signs [dims, dims] fp32, entries +-1, in blocks of dims' largest power of two."""
    block = _block(dims)
    generator = torch.Generator().manual_seed(SIGN_SEED)
    signs = 2.0 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1.0
    one = (hadamard(block) * block**0.5).round().float() * signs
    return torch.block_diag(*[one] * (dims // block)).to(device)


def _block(dims: int) -> int:
    return dims & -dims


def _half_away(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, x - 0.5).trunc()


# ---------------------------------------------------------------- QServe
def smooth_factors(amax: Tensor) -> Tensor:
    """SmoothAttention: amax**0.5 of K's channels [H, head_dim], the greater of each RoPE pair (i, i + head_dim / 2)."""
    pairs = amax.unflatten(-1, (2, -1)).amax(-2)
    return torch.cat([pairs, pairs], dim=-1).clamp_min(1e-5) ** SMOOTH_EXPONENT


def _qserve(setup: Setup) -> Attach:
    factors = {i: smooth_factors(s.k_amax)[:, None, :] for i, s in setup.statistics.items()}

    def quantised(layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        factor = factors[layer_idx].to(k.device)
        return affine(k.float() / factor, 4) * factor, affine(v, 4)

    return on_cache(quantised)


CODECS = [
    Codec(
        "int8_per_token_head",
        "int8/int4",
        VLLM,
        same_bytes(lambda d: d + 4.0),
        each_side(int8_per_token_head),
    ),
    Codec(
        "int4_per_token_head",
        "int8/int4",
        "QuaRot, arXiv 2404.00456",
        same_bytes(lambda d: d / 2 + 4.0),
        each_side(int4_per_token_head),
    ),
    Codec(
        "qserve_kv4",
        "QServe",
        "QServe, arXiv 2405.04532",
        same_bytes(lambda d: d / 2 + PAIR_BYTES),
        _qserve,
        needs="calibration",
    ),
]
