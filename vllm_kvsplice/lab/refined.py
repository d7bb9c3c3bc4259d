# SPDX-License-Identifier: Apache-2.0
"""A preset with one thing about its bases or bits changed: what might lose less at equal bytes. For studies, not for serving.

"fisher": the metric is the second moment of the gradients of the model's log-likelihood by the keys or values, the Fisher
information, instead of the queries' or the output projection's. Takes a backward per window (SqueezeLLM, arXiv:2306.07629).
"pairs": K's axes do not mix pairs of dimensions that RoPE turns together (the tiers' rotations still do); "pairs, unmixed":
nothing does, as RoPE-aware codecs have it (Palu, arXiv:2407.21118; KVQuant's order, arXiv:2401.18079).
"learned": tiers are rotated by a matrix that is fitted to their own rounding errors (ITQ, Gong and Lazebnik, 2011; SpinQuant,
arXiv:2405.16406) instead of Hadamard's.
"moving mean": K's mean before RoPE, turned to each position, is subtracted as well as one mean of all positions: all of it,
or its strongest quarter or eighth of RoPE's pairs; "steps of n": its mean over every n tokens, which a kernel would read at less cost.
QKV-bias models have such a mean (KVQuant quantises K before RoPE instead).
"3 bits": neighbouring 4- and 2-bit tiers give equally many dimensions to one of 3 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_kvsplice.calibration import moments
from vllm_kvsplice.calibration.calibrate import output_metrics
from vllm_kvsplice.calibration.presets import Recipe, tier_dims
from vllm_kvsplice.codec import bases
from vllm_kvsplice.codec.bases import Solution
from vllm_kvsplice.codec.layout import SIDES, Side
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.codec import KV, Attach, Bytes, Codec, Geometry, Setup, on_cache
from vllm_kvsplice.lab.statistics import LayerStatistics
from vllm_kvsplice.lab.tiers import Tiers, latent_bytes, read

Refinement = Literal[
    "as it is",
    "fisher V",
    "fisher K",
    "fisher K+V",
    "pairs",
    "pairs, unmixed",
    "learned",
    "moving mean",
    "moving mean, 1/4",
    "moving mean, 1/8",
    "moving mean, steps of 32",
    "moving mean, steps of 64",
    "3 bits",
]
ROWS = 8192  # of a head that a rotation is fitted to
# Share of RoPE's pairs that a moving mean has, and tokens that share it.
MOVING = {
    "moving mean": (1.0, 1),
    "moving mean, 1/4": (0.25, 1),
    "moving mean, 1/8": (0.125, 1),
    "moving mean, steps of 32": (1.0, 32),
    "moving mean, steps of 64": (1.0, 64),
}
STEPS = 40  # of the fit; its best rotation is kept
Turn = Callable[[Tensor, int], Tensor]  # (x [..., T, head_dim], direction 1 or -1): RoPE of positions 0 to T - 1


def refined_codec(name: str, recipe: Recipe, refinement: Refinement) -> Codec:
    """A calibrated recipe with one change; needs the vectors and gradients of the calibration text."""

    def count(geometry: Geometry) -> Bytes:
        return Bytes(*(latent_bytes(_tiers(recipe, side, geometry.head_dim, refinement)) for side in SIDES))

    prepare = partial(_attach, recipe=recipe, refinement=refinement)
    return Codec(f"{name}, {refinement}", "refined", "this project", count, prepare, needs="vectors")


def with_three_bits(tiers: Tiers) -> list[tuple[int, int]]:
    """The tiers with n dimensions each of 4 and of 2 bits, as many as both have, in 2 n of 3 bits: equally many bytes of codes."""
    dims = dict(tiers)
    n = min(dims.get(4, 0), dims.get(2, 0))
    if n:
        dims |= {4: dims[4] - n, 3: 2 * n, 2: dims[2] - n}
    return sorted(((bits, count) for bits, count in dims.items() if count), reverse=True)


def fitted_rotation(z: Tensor, tiers: Tiers, cost: Tensor) -> Tensor:
    """A rotation Q [H, dims, dims] of one tier's latents with E |Q^T read(Q z) - z|_cost^2 as small as found.

    With the codes c = read(Q z) held fixed the loss of P = Q^T is |P c - z|_S^2, whose majorant at P is least at the polar
    factor of P - eta S (P c - z) c^T; the codes are then made again. Hadamard's rotation, which z has had, is where it starts.

    Args:
        z: [N, H, dims]. tiers: the one tier. cost: S [H, dims, dims], what an error of the latents costs.
    """
    z = z.transpose(0, 1)  # [H, N, dims]
    turn = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
    best, least = turn, z.new_full((len(z),), torch.inf)
    for _ in range(STEPS):
        codes = read(z @ turn.transpose(1, 2), tiers)
        miss = codes @ turn - z
        loss = torch.einsum("hnd,hde,hne->h", miss, cost, miss)
        best = torch.where((loss < least)[:, None, None], turn, best)
        least = torch.minimum(loss, least)
        second = codes.transpose(1, 2) @ codes
        reach = torch.linalg.eigvalsh(cost)[:, -1] * torch.linalg.eigvalsh(second)[:, -1]
        gradient = cost @ miss.transpose(1, 2) @ codes
        u, _s, vh = torch.linalg.svd(turn.transpose(1, 2) - gradient / reach[:, None, None])
        turn = (u @ vh).transpose(1, 2)
    return best


# ---------------------------------------------------------------- bases
def _tiers(recipe: Recipe, side: Side, head_dim: int, refinement: Refinement) -> list[tuple[int, int]]:
    tiers = tier_dims(getattr(recipe, side).tiers, head_dim)
    return with_three_bits(tiers) if refinement == "3 bits" else tiers


def _attach(setup: Setup, recipe: Recipe, refinement: Refinement) -> Attach:
    device, head_dim = setup.model.device, setup.geometry.head_dim
    tiers = {side: _tiers(recipe, side, head_dim, refinement) for side in SIDES}
    share, step = MOVING.get(refinement, (0.0, 1))
    turn = _rope(setup.model) if share else None
    outputs = output_metrics(setup.model, {i: s.moments for i, s in setup.statistics.items()})
    found: dict[tuple[int, Side], Solution] = {}
    moving: dict[int, Tensor] = {}  # [H, head_dim], before RoPE
    for i, seen in setup.statistics.items():
        if turn is not None:
            moving[i] = moving_mean(seen.vectors["k"].x, turn, share)
        for side in SIDES:
            aware = seen.moments.q_outer if side == "k" else outputs[i]
            chosen = _solution(seen, side, aware, tiers[side], recipe, refinement, turn, moving.get(i))
            found[i, side] = Solution(*(part.float().to(device) for part in chosen))

    def through(layer_idx: int, side: Side, x: Tensor) -> Tensor:
        basis = found[layer_idx, side]
        mean = basis.mean[:, None]
        if turn is not None and side == "k":
            mean = mean + turned(moving[layer_idx].float(), x.shape[2], turn, step)
        z = torch.einsum("bhtd,hrd->bhtr", x.float() - mean, basis.encode)
        return torch.einsum("bhtr,hdr->bhtd", read(z, tiers[side]), basis.decode) + mean

    def replace(layer_idx: int, k: Tensor, v: Tensor) -> KV:
        return through(layer_idx, "k", k), through(layer_idx, "v", v)

    return on_cache(replace)


def _solution(
    seen: LayerStatistics,
    side: Side,
    aware: Tensor,
    tiers: Tiers,
    recipe: Recipe,
    refinement: Refinement,
    turn: Turn | None,
    moving: Tensor | None,
) -> Solution:
    """The basis of one side of one layer, its sigma folded in, fp64."""
    m, pulled = seen.moments, seen.vectors[side]
    total, outer = (m.k_sum, m.k_outer) if side == "k" else (m.v_sum, m.v_outer)
    mean, covariance = moments.mean(total, m.tokens), moments.covariance(total, outer, m.tokens)
    metric, equalise = aware, getattr(recipe, side).equalise
    if refinement.startswith("fisher") and side.upper() in refinement:
        gradient = pulled.gradient.flatten(0, 1).double()
        metric = torch.einsum("nhd,nhe->hde", gradient, gradient).cpu()
    if side == "k" and turn is not None and moving is not None:
        mean, covariance = _what_stays(pulled.x, turn, moving, MOVING[refinement][1])
    if side == "k" and refinement.startswith("pairs"):
        covariance, metric = _within_pairs(covariance), _within_pairs(metric)
        equalise = "sigma" if refinement == "pairs, unmixed" else equalise
    metric = bases.blend(metric)
    encode, decode, mean, sigma = bases.solve(mean, covariance, metric, tiers, equalise)
    encode, decode = encode / sigma[..., None], decode * sigma[:, None]
    if refinement == "learned":
        encode, decode = _relearned(pulled.x, encode, decode, mean, metric, tiers)
    return Solution(encode, decode, mean, torch.ones_like(sigma))


def _relearned(
    x: Tensor, encode: Tensor, decode: Tensor, mean: Tensor, metric: Tensor, tiers: Tiers
) -> tuple[Tensor, Tensor]:
    """Encoder and decoder with a fitted rotation in every tier below 8 bits: at 8 none is worth it."""
    rows = x.flatten(0, 1)
    rows = rows[:: max(1, len(rows) // ROWS)]
    z = torch.einsum("nhd,hrd->nhr", rows.float() - mean.float().to(x.device), encode.float().to(x.device))
    cost = (decode.transpose(1, 2) @ metric @ decode).float().to(x.device)
    encodes, decodes, start = [], [], 0
    for bits, dims in tiers:
        part = slice(start, start + dims)
        e, d = encode[:, part], decode[:, :, part]
        if 0 < bits < 8:
            turn = fitted_rotation(z[..., part], [(bits, dims)], cost[:, part, part]).double().cpu()
            e, d = turn @ e, d @ turn.transpose(1, 2)
        encodes.append(e)
        decodes.append(d)
        start += dims
    return torch.cat(encodes, 1), torch.cat(decodes, 2)


def _within_pairs(matrix: Tensor) -> Tensor:
    """[H, d, d] without what couples different pairs (i, i + d / 2), the pairs that Llama's and Qwen's RoPE turns."""
    pair = torch.arange(matrix.shape[-1]) % (matrix.shape[-1] // 2)
    return matrix * (pair[:, None] == pair[None, :])


def moving_mean(k: Tensor, turn: Turn, share: float) -> Tensor:
    """Mean [H, d] of keys [n, T, H, d] before RoPE, in the pairs whose turning takes most variance; nought in the others."""
    keys = k.transpose(1, 2).double()  # [n, H, T, d]
    mean = turn(keys, -1).mean((0, 2))
    moves = turned(mean, keys.shape[2], turn)
    energy = (moves - moves.mean(1, keepdim=True)).square().mean(1).unflatten(1, (2, -1)).sum(1)  # [H, pairs]
    least = energy.topk(max(1, round(share * energy.shape[1])), dim=1).values[:, -1:]
    return mean * (energy >= least).repeat(1, 2)


def turned(mean: Tensor, length: int, turn: Turn, step: int = 1) -> Tensor:
    """[H, d] at positions 0 to ``length`` - 1, or the mean of the ``step`` positions that each is among: [H, length, d]."""
    whole = -(-length // step) * step
    found = turn(mean[:, None].expand(-1, whole, -1), 1)
    return found.unflatten(1, (-1, step)).mean(2).repeat_interleave(step, 1)[:, :length]


def _what_stays(k: Tensor, turn: Turn, moving: Tensor, step: int = 1) -> tuple[Tensor, Tensor]:
    """Mean [H, d] and covariance [H, d, d] of keys [n, T, H, d] without their moving mean."""
    keys = k.transpose(1, 2).double()
    left = keys - turned(moving, keys.shape[2], turn, step)
    mean = left.mean((0, 2))
    left = left - mean[:, None]
    return mean.cpu(), (torch.einsum("nhtd,nhte->hde", left, left) / (left.shape[0] * left.shape[2])).cpu()


def _rope(model: Any) -> Turn:
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        raise KVSpliceError(f"{type(model).__name__} has no rotary_emb: a moving mean needs a model with RoPE.")

    def turn(x: Tensor, direction: int) -> Tensor:
        positions = torch.arange(x.shape[-2], device=x.device)[None]
        cos, sin = (t[0].to(x.dtype) for t in rotary(x.float(), positions))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin * direction

    return turn
