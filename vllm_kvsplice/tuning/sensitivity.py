# SPDX-License-Identifier: Apache-2.0
"""What every way to store a side of a layer will cost, in nats of KL divergence per token, from one backward per window.

In: a model, windows of calibration text, the moments, the plans. Out: ``Option`` lists by layer and side.

To second order an error e_t of token t's key or value costs KL(p || q) = 1/2 e^T F e, F the Fisher information: the mean of
g g^T, g the gradient of sum log p(y) with every y drawn from the model itself. Rounding errors of different tokens, tiers,
sides and layers are independent with mean zero, so their cross terms vanish and 1/2 sum_t (g_t . e_t)^2 is an unbiased
estimate, summed over tiers. The e_t are real ones: the tier is encoded and decoded by the reference. Token by token, since where
errors are large (attention sinks) gradients may be small. Fisher information as the price of quantisation: Optimal Brain
Surgeon (Hassibi and Stork, 1993), SqueezeLLM (https://arxiv.org/abs/2306.07629).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvsplice.calibration import moments
from vllm_kvsplice.calibration.calibrate import solve_layers
from vllm_kvsplice.calibration.gradients import Pulled, Slot, pull
from vllm_kvsplice.calibration.moments import Moments
from vllm_kvsplice.calibration.presets import Recipe
from vllm_kvsplice.codec import bases, reference
from vllm_kvsplice.codec.bases import Equalise
from vllm_kvsplice.codec.layout import SIDES, LatentLayout, Side
from vllm_kvsplice.tuning.candidates import WIDE, Option, Tiers, recipe_of, side_bytes

Place = tuple[int, int, int]  # a tier wherever it may stand: bits, first latent dimension, dims


class Axes(NamedTuple):
    """The principal axes of one side of one layer, before tiers are cut, fp32."""

    encode: Tensor  # [H, head_dim, head_dim]
    decode: Tensor  # [H, head_dim, head_dim]
    mean: Tensor  # [H, head_dim]
    rotations: dict[Place, tuple[Tensor, Tensor]]  # encode and decode [H, dims, dims] of a tier within the axes


def measure(
    model: Any,
    windows: Tensor,
    seen: Mapping[int, Moments],
    base: Recipe,
    plans: Mapping[Side, Sequence[Tiers]],
    seed: int,
) -> dict[Slot, list[Option]]:
    """Options of every layer and side.

    Args:
        windows: [n, seq_len] token ids; a forward and a backward each, and only one window's keys and values are held.
        seen: moments of every layer. base: how bases are solved. plans: by side, adding up to head_dim.
    """
    places = {side: sorted({p for plan in plans[side] for p in places_of(plan)}) for side in SIDES}
    axes = _axes(model, seen, base, places)
    losses: dict[Slot, dict[Place, float]] = {slot: dict.fromkeys(places[slot[1]], 0.0) for slot in axes}
    generator = torch.Generator(model.device).manual_seed(seed)
    for window in windows:
        for slot, pulled in pull(model, window.to(model.device), generator).items():
            for place, loss in _tier_losses(pulled, axes[slot], places[slot[1]], model.dtype).items():
                losses[slot][place] += loss / windows.numel()
    return {
        slot: [
            Option(plan, side_bytes(sum(n for _, n in plan), plan), sum(losses[slot][p] for p in places_of(plan)))
            for plan in plans[slot[1]]
        ]
        for slot in axes
    }


def places_of(plan: Tiers) -> list[Place]:
    """A plan's tiers with the dimension at which each starts."""
    starts = [sum(n for _, n in plan[:i]) for i in range(len(plan))]
    return [(bits, start, n) for (bits, n), start in zip(plan, starts, strict=True)]


def _tier_losses(pulled: Pulled, axes: Axes, places: Sequence[Place], dtype: torch.dtype) -> dict[Place, float]:
    """1/2 sum over tokens and heads of (g . e)^2, each tier quantised alone."""
    y = reference.encode(pulled.x, axes.encode, axes.mean)
    pull = torch.einsum("thd,hdr->thr", pulled.gradient, axes.decode)  # g . D e is (D^T g) . e
    wide = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    found = {}
    for place in places:
        bits, start, dims = place
        part, along = y[..., start : start + dims], pull[..., start : start + dims]
        if bits == WIDE:  # untouched: stored as it is, in no basis
            dot = ((pulled.x.to(wide).float() - pulled.x) * pulled.gradient).sum(-1)
        elif bits == 0:
            dot = -(part * along).sum(-1)
        else:
            encode, decode = axes.rotations[place]
            z = torch.einsum("thd,hrd->thr", part, encode)
            tier = ((bits, dims),)
            error = reference.roundtrip(z, LatentLayout.of(dims, tier, tier), "k", wide) - z
            dot = (error * torch.einsum("thd,hdr->thr", along, decode)).sum(-1)
        found[place] = 0.5 * float(dot.double().square().sum())
    return found


def _axes(
    model: Any, seen: Mapping[int, Moments], base: Recipe, places: Mapping[Side, Sequence[Place]]
) -> dict[Slot, Axes]:
    """Axes of every layer and side, on the model's device."""
    found = {}
    for i, m in seen.items():
        head_dim = m.k_sum.shape[1]
        whole = ((8, head_dim),)  # one tier that is not rotated: the axes themselves
        recipe = recipe_of(base, LatentLayout.of(head_dim, whole, whole))
        plain = recipe.model_copy(
            update={side: getattr(recipe, side).model_copy(update={"equalise": "none"}) for side in SIDES}
        )
        layer = solve_layers(model, {i: m}, LatentLayout.of(head_dim, whole, whole), plain)[i]
        for side, total, outer in (("k", m.k_sum, m.k_outer), ("v", m.v_sum, m.v_outer)):
            basis = layer.side(side)  # type: ignore[arg-type]
            encode = basis.encode.double()
            latents = encode @ moments.covariance(total, outer, m.tokens) @ encode.transpose(1, 2)
            variance = latents.diagonal(dim1=1, dim2=2).clamp_min(0.0)
            equalise = getattr(base, side).equalise
            axes = [t.to(model.device) for t in (basis.encode, basis.decode, basis.mean)]
            rotations = {p: _rotation(variance, p, equalise, model.device) for p in places[side] if 0 < p[0] < WIDE}  # type: ignore[index]
            found[i, side] = Axes(axes[0], axes[1], axes[2], rotations)
    return found  # type: ignore[return-value]


def _rotation(variance: Tensor, place: Place, equalise: Equalise, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tier's own rotation and scaling, for latents of these variances [H, head_dim]."""
    bits, start, dims = place
    part = variance[:, start : start + dims]
    solution = bases.solve(torch.zeros_like(part), torch.diag_embed(part), None, [(bits, dims)], equalise)
    sigma = solution.sigma
    return (solution.encode / sigma[..., None]).float().to(device), (solution.decode * sigma[:, None]).float().to(
        device
    )
