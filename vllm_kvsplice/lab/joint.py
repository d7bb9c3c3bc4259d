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
from vllm_kvsplice.codec.reference import dequantize, quantize
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.codec import KV, Attach, Bytes, Codec, Geometry, Setup, on_cache
from vllm_kvsplice.lab.dense import bf16


def joint_codec(name: str, bits: int, k_rank: int | None, v_rank: int | None) -> Codec:
    """Latents of ``bits`` (16, 8, 4 or 2) with a rank for all heads together; None leaves a side in 16 bits."""
    count = partial(_bytes, bits=bits, ranks=(k_rank, v_rank))
    prepare = partial(_attach, bits=bits, ranks=(k_rank, v_rank))
    return Codec(name, "joint", "this project", count, prepare, needs="joint")


def latent_bytes(rank: int, bits: int) -> float:
    """All-in bytes of one token's latent: codes, and one scale byte below 16 bits."""
    return rank * bits / 8 + (bits < 16)


def through(x: Tensor, basis: Solution, bits: int) -> Tensor:
    """Keys or values [B, H, T, head_dim] through their joint latent in a basis of one head of H * head_dim."""
    rows = x.transpose(1, 2).flatten(2).float() - basis.mean[0]
    z = rows @ basis.encode[0].T
    z = z.bfloat16().float() if bits == 16 else dequantize(*quantize(z, bits), bits)
    found = z @ basis.decode[0].T + basis.mean[0]
    return found.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _bytes(geometry: Geometry, bits: int, ranks: tuple[int | None, int | None]) -> Bytes:
    heads, full = geometry.num_kv_heads, geometry.num_kv_heads * geometry.head_dim
    for rank in ranks:
        if rank is not None and not 0 < rank <= full:
            raise KVSpliceError(f"joint rank {rank} is not possible: expected 1 to {full}, all heads together.")
    return Bytes(*(2.0 * geometry.head_dim if r is None else latent_bytes(r, bits) / heads for r in ranks))


def _attach(setup: Setup, bits: int, ranks: tuple[int | None, int | None]) -> Attach:
    found: dict[int, tuple[Solution | None, Solution | None]] = {}
    for i, seen in setup.statistics.items():
        assert seen.joint is not None  # Codec.needs
        m = seen.joint
        sides = ((m.k_sum, m.k_outer, ranks[0]), (m.v_sum, m.v_outer, ranks[1]))
        found[i] = tuple(_solved(*side, m.tokens, bits, setup.model.device) for side in sides)  # type: ignore[assignment]

    def replace(layer_idx: int, k: Tensor, v: Tensor) -> KV:
        k_basis, v_basis = found[layer_idx]
        return _side(k, k_basis, bits), _side(v, v_basis, bits)

    return on_cache(replace)


def _solved(
    total: Tensor, outer: Tensor, rank: int | None, tokens: int, bits: int, device: torch.device
) -> Solution | None:
    """Principal axes, plain squared error, equalised inside the one tier."""
    if rank is None:
        return None
    tiers = [(bits, rank), (0, total.shape[1] - rank)]
    covariance = moments.covariance(total, outer, tokens)
    solution = bases.solve(moments.mean(total, tokens), covariance, None, tiers)
    return Solution(*(part.float().to(device) for part in solution))


def _side(x: Tensor, basis: Solution | None, bits: int) -> Tensor:
    return bf16(x) if basis is None else through(x, basis, bits)
