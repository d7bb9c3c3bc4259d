# SPDX-License-Identifier: Apache-2.0
"""Joint latents: one latent for all KV heads of a layer, where KVSplice has one for each. For studies, not for serving.

Keys (after RoPE) or values of all H heads of a token are one vector of H * head_dim numbers; its principal axes see what
heads have in common, which no basis of one head can. The latent is shared, so bytes are counted per token and divided by
H. What that costs in operations: a head's query against a shared latent of ``rank`` numbers takes ``rank`` products per
cached token, where it takes rank / H against its own latent of equal bytes; the same for the sum over values.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vllm_kvsplice.calibration import moments
from vllm_kvsplice.codec import bases
from vllm_kvsplice.codec.bases import Solution
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.codec import KV, Attach, Bytes, Codec, Geometry, Setup, on_cache
from vllm_kvsplice.lab.dense import bf16
from vllm_kvsplice.lab.tiers import Tiers, latent_bytes, read


def joint_codec(name: str, k: Tiers | None, v: Tiers | None) -> Codec:
    """Tiers for all heads of a layer together; None leaves a side in 16 bits."""
    count, prepare = partial(_bytes, sides=(k, v)), partial(_attach, sides=(k, v))
    return Codec(name, "joint", "this project", count, prepare, needs="joint")


def through(x: Tensor, basis: Solution, tiers: Tiers) -> Tensor:
    """Keys or values [B, H, T, head_dim] through their joint latent in a basis of one head of H * head_dim."""
    rows = x.transpose(1, 2).flatten(2).float() - basis.mean[0]
    found = read(rows @ basis.encode[0].T, tiers) @ basis.decode[0].T + basis.mean[0]
    return found.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _bytes(geometry: Geometry, sides: tuple[Tiers | None, Tiers | None]) -> Bytes:
    heads, full = geometry.num_kv_heads, geometry.num_kv_heads * geometry.head_dim
    for rank in (sum(dims for _, dims in tiers) for tiers in sides if tiers is not None):
        if not 0 < rank <= full:
            raise KVSpliceError(f"joint rank {rank} is not possible: expected 1 to {full}, all heads together.")
    return Bytes(*(2.0 * geometry.head_dim if t is None else latent_bytes(t) / heads for t in sides))


def _attach(setup: Setup, sides: tuple[Tiers | None, Tiers | None]) -> Attach:
    found: dict[int, tuple[Solution | None, Solution | None]] = {}
    for i, seen in setup.statistics.items():
        assert seen.joint is not None  # Codec.needs
        m = seen.joint
        k = _solved(m.k_sum, m.k_outer, sides[0], m.tokens, setup.model.device)
        v = _solved(m.v_sum, m.v_outer, sides[1], m.tokens, setup.model.device)
        found[i] = k, v

    def replace(layer_idx: int, k: Tensor, v: Tensor) -> KV:
        k_basis, v_basis = found[layer_idx]
        return _side(k, k_basis, sides[0]), _side(v, v_basis, sides[1])

    return on_cache(replace)


def _solved(total: Tensor, outer: Tensor, tiers: Tiers | None, tokens: int, device: torch.device) -> Solution | None:
    """Principal axes, plain squared error, equalised inside each tier."""
    if tiers is None:
        return None
    covariance = moments.covariance(total, outer, tokens)
    solution = bases.solve(moments.mean(total, tokens), covariance, None, tiers)
    return Solution(*(part.float().to(device) for part in solution))


def _side(x: Tensor, basis: Solution | None, tiers: Tiers | None) -> Tensor:
    return bf16(x) if basis is None or tiers is None else through(x, basis, tiers)
