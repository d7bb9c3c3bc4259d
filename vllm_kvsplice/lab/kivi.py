# SPDX-License-Identifier: Apache-2.0
"""KIVI (arXiv 2402.02750) and AsymKV (arXiv 2410.13212): keys quantised per channel over groups of tokens, values per token.

A residual of recent tokens stays in 16 bits. Keys leave it ``residual`` at a time, values one by one, so a query sees
1..residual exact keys and ``residual`` exact values, whichever tokens those are for it: scoring gives attention three copies
of the sequence, (decoded, decoded), (decoded K, exact V) and (exact, exact), and shows each query one of the three for
every token. AsymKV is KIVI with 2 bits in the first layers and 1 in the others, chosen for K and V apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.lab.affine import group_bytes, grouped
from vllm_kvsplice.lab.codec import KV, Attach, Bytes, Codec, Geometry, Setup
from vllm_kvsplice.lab.dense import bf16

GROUP = 32
KIVI_PAPER = "KIVI, arXiv 2402.02750"
ASYMKV_PAPER = "AsymKV, arXiv 2410.13212"
# (layer, number of layers) -> bits of K and of V
LayerBits = Callable[[int, int], tuple[int, int]]


def per_channel(k: Tensor, bits: int, group_size: int = GROUP) -> Tensor:
    """Keys [..., T, d], each channel in groups of ``group_size`` tokens; the tokens after the last whole group as they are."""
    whole = k.shape[-2] // group_size * group_size
    done = grouped(k[..., :whole, :].transpose(-1, -2), bits, group_size).transpose(-1, -2)
    return torch.cat([done, k[..., whole:, :].float()], dim=-2)


def per_token(v: Tensor, bits: int, group_size: int = GROUP) -> Tensor:
    """Values [..., T, d], each token in groups of ``group_size`` channels, all in one where that does not divide d."""
    return grouped(v, bits, value_group(v.shape[-1], group_size))


def value_group(head_dim: int, group_size: int = GROUP) -> int:
    """Channels that share a scale of V."""
    return group_size if head_dim % group_size == 0 else head_dim


def quantised(k: Tensor, v: Tensor, k_bits: int, v_bits: int) -> KV:
    """The cache outside the residual: keys and values [B, H, T, d] decoded from their codes."""
    return per_channel(k, k_bits), per_token(v, v_bits)


def visible(queries: int, residual: int, device: torch.device) -> Tensor:
    """Which of the three copies of token j query t reads: [T, 3T] bool, not yet causal, exactly one True per (t, j).

    With n = t + 1 tokens in the cache the last (n - 1) % residual + 1 have exact keys, the last ``residual`` exact values.
    """
    t = torch.arange(queries, device=device)
    age = t[:, None] - t[None, :]
    exact_k = age <= (t % residual)[:, None]
    exact_v = age < residual
    return torch.cat([~exact_v, exact_v & ~exact_k, exact_k], dim=1)


def _attach(setup: Setup, bits: LayerBits, residual: int) -> Attach:
    layers = setup.geometry.num_layers

    def transform(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes_k, codes_v = (x.to(k.dtype) for x in quantised(k, v, *bits(layer_idx, layers)))
        k, v = bf16(k).to(k.dtype), bf16(v).to(v.dtype)
        seen = visible(k.shape[2], residual, k.device)[None, None]
        return torch.cat([codes_k, codes_k, k], 2), torch.cat([codes_v, v, v], 2), seen

    return lambda model, run: transformed_kv(model, transform)


def residual_bytes(geometry: Geometry, k_bits: int, v_bits: int, residual: int) -> Bytes:
    """With T tokens cached: ``residual`` values and, on average over the cycle, (residual - 1) / 2 keys in 16 bits."""
    d, tokens = geometry.head_dim, geometry.seq_len
    exact_k, exact_v = (min(1.0, n / tokens) for n in ((residual - 1) / 2, residual))
    k = exact_k * 2 * d + (1 - exact_k) * group_bytes(d, k_bits, GROUP)
    return Bytes(k, exact_v * 2 * d + (1 - exact_v) * group_bytes(d, v_bits, value_group(d)))


def _bytes(geometry: Geometry, bits: LayerBits, residual: int) -> Bytes:
    layers = [
        residual_bytes(geometry, *bits(i, geometry.num_layers), residual=residual) for i in range(geometry.num_layers)
    ]
    return Bytes(*(sum(side) / len(layers) for side in zip(*layers, strict=True)))


def _codec(name: str, paper: str, bits: LayerBits, residual: int) -> Codec:
    family = paper.split(",")[0]
    prepare = partial(_attach, bits=bits, residual=residual)
    return Codec(name, family, paper, partial(_bytes, bits=bits, residual=residual), prepare)


def _same(bits: int) -> LayerBits:
    return lambda layer_idx, layers: (bits, bits)


def _asymmetric(share_k: float, share_v: float) -> LayerBits:
    """2 bits in the first ``share`` of the layers, 1 bit in the others."""
    return lambda i, layers: (2 if i < share_k * layers else 1, 2 if i < share_v * layers else 1)


CODECS = [
    *(_codec(f"kivi{b}_r{r}", KIVI_PAPER, _same(b), r) for b in (4, 2) for r in (128, 32)),
    # AsymKV-l/0 of the paper: 1-bit values everywhere, 2-bit keys in all layers or in the first half of them.
    _codec("asymkv_all", ASYMKV_PAPER, _asymmetric(1.0, 0.0), 128),
    _codec("asymkv_half", ASYMKV_PAPER, _asymmetric(0.5, 0.0), 128),
]
