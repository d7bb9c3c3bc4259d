# SPDX-License-Identifier: Apache-2.0
"""MiniCache (arXiv 2405.14366): pairs of adjacent layers of the model's second half share one direction per token and head.

Directions are interpolated on the sphere (SLERP), both norms are kept, and the tokens whose directions differ most keep
their own vectors. A layer cannot wait for the next one within a forward, so what is merged are the keys and values of the
uncompressed run over the same tokens: a cache merged after an exact prefill, seen by every query, its own token included.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.lab.codec import KV, Attach, Bytes, Codec, Geometry, Run, Setup
from vllm_kvsplice.lab.dense import bf16

PAPER = "MiniCache, arXiv 2405.14366"
WEIGHT = 0.6  # the paper's t: how far the shared direction lies towards the deeper layer's
RETAINED = 0.05  # share of tokens unmerged; the paper's threshold gamma = 0.05 on distances keeps about as many
NORM_BYTES, INDEX_BYTES = 2, 4


def pairs(num_layers: int) -> list[tuple[int, int]]:
    """Layers merged with each other: from the middle on, two by two."""
    return [(i, i + 1) for i in range(num_layers // 2, num_layers - 1, 2)]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The unit vector on the great circle from a to b, both [..., d] of norm 1, at t of the angle; a where they are equal."""
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    sine = angle.sin()
    near = sine < 1e-6
    sine = torch.where(near, 1.0, sine)
    return torch.where(near, a, (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine)


def merge(a: Tensor, b: Tensor, retained: float = RETAINED) -> tuple[Tensor, Tensor]:
    """What both layers read in place of a and b [..., T, d]: the shared direction at their own norms, fp32.

    The ``retained`` share of the T tokens at the greatest angle keep their own vectors.
    """
    a, b = a.float(), b.float()
    norms = [x.norm(dim=-1, keepdim=True).clamp_min(1e-8) for x in (a, b)]
    units = [x / n for x, n in zip((a, b), norms, strict=True)]
    shared = slerp(units[0], units[1], WEIGHT).bfloat16().float()
    cosine = (units[0] * units[1]).sum(-1)
    kept = torch.zeros_like(cosine, dtype=torch.bool)
    count = round(retained * a.shape[-2])
    kept.scatter_(-1, cosine.topk(count, dim=-1, largest=False).indices, True)
    first, second = (torch.where(kept[..., None], bf16(x), shared * n) for x, n in zip((a, b), norms, strict=True))
    return first, second


def merged(base: Mapping[int, KV], num_layers: int) -> dict[int, KV]:
    """Keys and values of all merged layers, from those of the uncompressed run."""
    found: dict[int, KV] = {}
    for i, j in pairs(num_layers):
        k = merge(base[i][0], base[j][0])
        v = merge(base[i][1], base[j][1])
        found[i], found[j] = (k[0], v[0]), (k[1], v[1])
    return found


def _prepare(setup: Setup) -> Attach:
    layers = setup.geometry.num_layers

    def attach(model: object, run: Run):  # type: ignore[no-untyped-def]
        found = merged(run.base, layers)

        def transform(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> KV:
            return found.get(layer_idx) or (bf16(k), bf16(v))

        return transformed_kv(model, transform)

    return attach


def _bytes(geometry: Geometry) -> Bytes:
    d, dense = geometry.head_dim, 2 * geometry.head_dim
    # Of one layer: half of the shared direction, a norm, and the retained tokens' vectors with their indices.
    one = d + NORM_BYTES + RETAINED * (dense + INDEX_BYTES / 2)
    share = 2 * len(pairs(geometry.num_layers)) / geometry.num_layers
    each = share * one + (1 - share) * dense
    return Bytes(each, each)


CODECS = [Codec("minicache", "MiniCache", PAPER, _bytes, _prepare, needs_base=True)]
