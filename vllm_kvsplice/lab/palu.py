# SPDX-License-Identifier: Apache-2.0
"""Palu (arXiv 2407.21118): keys before RoPE and values as low-rank latents shared by groups of heads, optionally quantised.

The weights W of a group of up to four KV heads are cut to rank r such that the output y = W x loses least on calibration
text; with whitening by the input's second moment that is the projector on the leading eigenvectors of E[y y^T]. Ranks are
the same everywhere, or, as ``_fisher`` says, in proportion to the Fisher information of each group's weights, the paper's
choice for deep models. Latents of 4 or 3 bits are Hadamard-rotated and quantised per token. A bias is added after
reconstruction, and keys get their RoPE then: so this codec acts on the outputs of k_proj and v_proj, and needs a model
that has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from vllm_kvsplice.codec.layout import SIDES, Side
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.affine import PAIR_BYTES, affine
from vllm_kvsplice.lab.codec import Attach, Bytes, Codec, Geometry, Setup
from vllm_kvsplice.lab.rotations import hadamard
from vllm_kvsplice.lab.statistics import LayerStatistics, watched_projections

PAPER = "Palu, arXiv 2407.21118"
GROUP_HEADS = 4
RANK_MULTIPLE = 8
Place = tuple[int, Side, int]  # layer, side, group of heads


def group_heads(num_kv_heads: int) -> int:
    """KV heads that share a latent: the greatest divisor of their number up to four."""
    return max(n for n in range(1, GROUP_HEADS + 1) if num_kv_heads % n == 0)


def allocate(weights: Sequence[float], total: int, full: int) -> list[int]:
    """Ranks in proportion to ``weights``: multiples of 8 from 8 to ``full`` that add up to the multiple of 8 below ``total``."""
    ranks = [RANK_MULTIPLE] * len(weights)
    while sum(ranks) + RANK_MULTIPLE <= total and min(ranks) < full:
        open_ = [i for i, rank in enumerate(ranks) if rank < full]
        i = max(open_, key=lambda i: weights[i] / (ranks[i] + RANK_MULTIPLE / 2))  # highest averages (Sainte-Lague)
        ranks[i] = min(full, ranks[i] + RANK_MULTIPLE)
    return ranks


def low_rank(y: Tensor, basis: Tensor, bits: int) -> Tensor:
    """y [..., n] through its latent in a basis [n, rank] of orthonormal columns, stored in 16, 4 or 3 bits."""
    z = y.float() @ basis
    if bits == 16:
        return z.bfloat16().float() @ basis.T
    rotation = hadamard(basis.shape[1], z.device)
    return affine(z @ rotation.T, bits) @ rotation @ basis.T


def latent_bytes(rank: float, bits: int) -> float:
    """Bytes of one group's latent."""
    return rank * bits / 8 + (0 if bits == 16 else PAIR_BYTES)


def _bytes(geometry: Geometry, kept: float, bits: int) -> Bytes:
    """K and V together as stored; Fisher allocation moves ranks between the sides, which this splits evenly."""
    group = group_heads(geometry.num_kv_heads)
    full = group * geometry.head_dim
    places = 2 * geometry.num_layers * geometry.num_kv_heads // group
    rank = sum(allocate([1.0] * places, int(places * full * kept), full)) / places
    return Bytes(latent_bytes(rank, bits) / group, latent_bytes(rank, bits) / group)


def ranks_of(statistics: Mapping[int, LayerStatistics], kept: float, fisher: bool) -> dict[Place, int]:
    """The rank of every group of heads; KVSpliceError if the projections were not seen."""
    if not all(s.outer for s in statistics.values()):
        raise KVSpliceError("palu needs a model with k_proj and v_proj: leave it out with --codecs.")
    heads, head_dim = next(iter(statistics.values())).k_amax.shape
    group = group_heads(heads)
    places = [(i, side, g) for i in sorted(statistics) for side in SIDES for g in range(heads // group)]
    weights = [
        float(statistics[i].fisher[side].view(-1, group).mean(-1)[g]) if fisher else 1.0 for i, side, g in places
    ]
    full = group * head_dim
    return dict(zip(places, allocate(weights, int(len(places) * full * kept), full), strict=True))


def _attach(setup: Setup, kept: float, bits: int, fisher: bool) -> Attach:
    width = group_heads(setup.geometry.num_kv_heads) * setup.geometry.head_dim
    device = setup.model.device
    bases = {
        (i, side, g): _leading(setup.statistics[i].outer[side], g * width, width, rank).to(device)
        for (i, side, g), rank in ranks_of(setup.statistics, kept, fisher).items()
    }

    def replace(layer_idx: int, side: Side, y: Tensor) -> Tensor:
        parts = [low_rank(part, bases[layer_idx, side, g], bits) for g, part in enumerate(y.split(width, dim=-1))]
        return torch.cat(parts, dim=-1)

    return lambda model, run: watched_projections(model, replace)


def _leading(outer: Tensor, start: int, width: int, rank: int) -> Tensor:
    """Eigenvectors [width, rank] fp32 of a diagonal block of a second moment, of its greatest eigenvalues."""
    block = outer[start : start + width, start : start + width]
    return torch.linalg.eigh(block).eigenvectors.flip(-1)[:, :rank].float()


def _codec(percent: int, bits: int, fisher: bool = False) -> Codec:
    name = f"palu_{percent}" + ("" if bits == 16 else f"_int{bits}") + ("_fisher" if fisher else "")
    count = partial(_bytes, kept=percent / 100, bits=bits)
    prepare = partial(_attach, kept=percent / 100, bits=bits, fisher=fisher)
    return Codec(name, "Palu", PAPER, count, prepare, needs="gradients" if fisher else "calibration")


CODECS = [
    *(_codec(percent, bits) for percent, bits in ((70, 16), (50, 16), (70, 4), (50, 4), (70, 3))),
    *(_codec(percent, 4, fisher=True) for percent in (70, 50)),
]
