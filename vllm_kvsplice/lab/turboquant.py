# SPDX-License-Identifier: Apache-2.0
"""TurboQuant (arXiv 2504.19874) with the presets of vLLM's ``--kv-cache-dtype turboquant_*``.

Keys: the direction is rotated by a Hadamard matrix and each coordinate gets the nearest of the Lloyd-Max centroids of a
Gaussian; the norm is stored in fp16. ``nc`` scales the decoded direction back to norm 1. Values: uniform levels between the
row's extremes, not rotated. k8v4 has plain e4m3 keys. vLLM keeps the first and last two layers in 16 bits; ``_edges`` names
that form, counted with those layers.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from vllm_kvsplice.lab.codec import KV, Attach, Bytes, Codec, Geometry, Setup, on_cache
from vllm_kvsplice.lab.dense import bf16, fp8
from vllm_kvsplice.lab.rotations import hadamard

PAPER = "TurboQuant, arXiv 2504.19874"
# name: bits of K (8: e4m3), bits of V, norm correction
PRESETS = {
    "turboquant_k8v4": (8, 4, False),
    "turboquant_4bit_nc": (4, 4, True),
    "turboquant_k3v4_nc": (3, 4, True),
    "turboquant_3bit_nc": (3, 3, True),
}
WITH_EDGES = ("turboquant_4bit_nc", "turboquant_3bit_nc")
EDGE = 2  # layers at either end, at most half of the model at each


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> Tensor:
    """Centroids [2**bits] fp64 of the quantiser of N(0, 1) with the least mean squared error (Lloyd 1982, Max 1960)."""
    n = 2**bits
    centroids = torch.linspace(-3.5, 3.5, 2 * n + 1, dtype=torch.float64)[1::2]
    for _ in range(10_000):
        inner = (centroids[1:] + centroids[:-1]) / 2
        edges = torch.cat([torch.full((1,), -math.inf), inner, torch.full((1,), math.inf)])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        better = -density.diff() / mass
        if (better - centroids).abs().max() < 1e-12:
            break
        centroids = better
    return better


def lloyd_max_direction(x: Tensor, bits: int, norm_correction: bool) -> Tensor:
    """Keys [..., d] from their fp16 norm and the centroid of each rotated coordinate of their direction."""
    d = x.shape[-1]
    x = x.float()
    rotation = hadamard(d, x.device)
    centroids = (lloyd_max(bits) / math.sqrt(d)).to(x.device, torch.float32)
    norm = x.norm(dim=-1, keepdim=True)
    turned = (x / (norm + 1e-8)) @ rotation.T
    found = centroids[torch.bucketize(turned, (centroids[1:] + centroids[:-1]) / 2, right=True)]
    if norm_correction:
        found = found / found.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    return norm.half().float() * (found @ rotation)


def uniform(x: Tensor, bits: int) -> Tensor:
    """Values [..., d]: codes by the fp32 minimum and step, decoded with both in fp16."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    top = 2**bits - 1
    step = ((high - low) / top).clamp_min(1e-8)
    codes = ((x - low) / step + 0.5).floor().clamp(0, top)
    return codes * step.half().float() + low.half().float()


def is_edge(layer_idx: int, num_layers: int) -> bool:
    """Whether vLLM keeps this layer in 16 bits."""
    n = min(EDGE, num_layers // 2)
    return not n <= layer_idx < num_layers - n


def _decoded(k: Tensor, v: Tensor, k_bits: int, v_bits: int, correction: bool) -> KV:
    key = fp8(k) if k_bits == 8 else lloyd_max_direction(k, k_bits, correction)
    return key, uniform(v, v_bits)


def _bytes(head_dim: int, k_bits: int, v_bits: int) -> Bytes:
    k = head_dim if k_bits == 8 else math.ceil(head_dim * k_bits / 8) + 2  # and the norm
    return Bytes(k, math.ceil(head_dim * v_bits / 8) + 4)  # and minimum and step


def _codec(name: str, edges: bool) -> Codec:
    preset = PRESETS[name]

    def prepare(setup: Setup) -> Attach:
        layers = setup.geometry.num_layers
        return on_cache(lambda i, k, v: (bf16(k), bf16(v)) if edges and is_edge(i, layers) else _decoded(k, v, *preset))

    def count(geometry: Geometry) -> Bytes:
        inner = _bytes(geometry.head_dim, *preset[:2])
        kept = sum(is_edge(i, geometry.num_layers) for i in range(geometry.num_layers)) if edges else 0
        share, dense = kept / geometry.num_layers, 2 * geometry.head_dim
        return Bytes(*(share * dense + (1 - share) * part for part in inner))

    return Codec(name + ("_edges" if edges else ""), "TurboQuant", PAPER, count, prepare)


CODECS = [_codec(name, False) for name in PRESETS] + [_codec(name, True) for name in WITH_EDGES]
