# SPDX-License-Identifier: Apache-2.0
"""What calibration shows a codec: moments, extremes, the projections before RoPE, and what a weight matters. One pass each.

In: a model and windows of calibration text. Out: ``LayerStatistics`` by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_kvsplice.calibration import moments
from vllm_kvsplice.calibration.gradients import Pulled, pull
from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.calibration.moments import Moments
from vllm_kvsplice.codec.fingerprint import model_shape
from vllm_kvsplice.codec.layout import SIDES, Side

NAMES = {"k": "k_proj", "v": "v_proj"}
VECTOR_WINDOWS = 8  # of which keys, values and gradients are held
FISHER_WINDOWS = 8  # a backward each; the mean squared gradient of a weight group settles in a few


class LayerStatistics(NamedTuple):
    """Of one layer with H KV heads, on the CPU."""

    moments: Moments  # after RoPE, see calibration.moments
    k_amax: Tensor  # [H, head_dim] fp32, largest magnitude after RoPE
    v_amax: Tensor  # [H, head_dim] fp32
    # Of projections without their bias, before RoPE, by side; empty where the model has no k_proj and v_proj:
    outer: Mapping[Side, Tensor]  # [H * head_dim, H * head_dim] fp64, sum of y y^T over tokens
    fisher: Mapping[Side, Tensor]  # [H] fp32, mean over a head's weights of the root mean squared gradient
    # Of the first VECTOR_WINDOWS windows, [n, T, H, head_dim] each, on the model's device; empty unless asked for:
    vectors: Mapping[Side, Pulled] = {}
    joint: Moments | None = None  # of all heads as one of H * head_dim dimensions, after RoPE; without queries


@torch.no_grad()
def collect(model: Any, windows: Tensor) -> dict[int, LayerStatistics]:
    """Statistics of every attention layer over windows of token ids [n, seq_len], without ``fisher``."""
    shape = model_shape(model.config)
    seen: dict[int, LayerStatistics] = {}

    def watch(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = seen.get(layer_idx) or _nothing(shape.num_kv_heads, shape.head_dim, k.device)
        seen[layer_idx] = before._replace(
            moments=moments.add_batch(before.moments, q, k, v),
            k_amax=torch.maximum(before.k_amax, _amax(k)),
            v_amax=torch.maximum(before.v_amax, _amax(v)),
        )
        return k, v

    outer: dict[tuple[int, Side], Tensor] = {}

    def add(layer_idx: int, side: Side, y: Tensor) -> None:
        rows = y.flatten(0, -2).double()
        outer[layer_idx, side] = outer.get((layer_idx, side), 0) + rows.T @ rows

    body = model.base_model  # without the vocabulary's logits
    with transformed_kv(body, watch), watched_projections(model, add):
        for window in windows:
            body(window[None].to(model.device), use_cache=False)
    return {
        i: s._replace(
            moments=Moments(s.moments.tokens, *(t.cpu() for t in s.moments[1:])),
            k_amax=s.k_amax.cpu(),
            v_amax=s.v_amax.cpu(),
            outer={side: outer[i, side].cpu() for side in SIDES if (i, side) in outer},
        )
        for i, s in sorted(seen.items())
    }


@torch.no_grad()
def with_joint(model: Any, windows: Tensor, statistics: Mapping[int, LayerStatistics]) -> dict[int, LayerStatistics]:
    """Statistics with the moments of all heads together, of the same windows."""
    joint: dict[int, Moments] = {}

    def watch(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_all, v_all = (x.transpose(1, 2).flatten(2)[:, None] for x in (k, v))
        before = joint.get(layer_idx) or moments.new_moments(1, k_all.shape[-1], k.device)
        joint[layer_idx] = moments.add_batch(before, k_all[:, :, :0], k_all, v_all)
        return k, v

    body = model.base_model
    with transformed_kv(body, watch):
        for window in windows:
            body(window[None].to(model.device), use_cache=False)
    return {
        i: s._replace(joint=Moments(joint[i].tokens, *(t.cpu() for t in joint[i][1:]))) for i, s in statistics.items()
    }


def with_vectors(model: Any, windows: Tensor, statistics: Mapping[int, LayerStatistics]) -> dict[int, LayerStatistics]:
    """Statistics with keys, values and the gradients by them of the first VECTOR_WINDOWS windows."""
    generator = torch.Generator(model.device).manual_seed(0)
    seen = [pull(model, window.to(model.device), generator) for window in windows[:VECTOR_WINDOWS]]

    def stacked(layer_idx: int, side: Side) -> Pulled:
        return Pulled(*(torch.stack(parts) for parts in zip(*(one[layer_idx, side] for one in seen), strict=True)))

    return {i: s._replace(vectors={side: stacked(i, side) for side in SIDES}) for i, s in statistics.items()}


def with_fisher(model: Any, windows: Tensor, statistics: Mapping[int, LayerStatistics]) -> dict[int, LayerStatistics]:
    """Statistics with the Fisher information of the projections' weights, from the first FISHER_WINDOWS windows."""
    weights = {(i, side): m.weight for i, side, m in projections(model)}
    total = {key: torch.zeros_like(w, dtype=torch.float32) for key, w in weights.items()}
    windows = windows[:FISHER_WINDOWS].to(model.device)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        for w in weights.values():
            w.requires_grad_(True)
        for window in windows if weights else ():
            loss = model(window[None], labels=window[None], use_cache=False).loss
            for key, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[key] += gradient.float().square()
    finally:
        for p, before in wanted:
            p.requires_grad_(before)
    heads = model_shape(model.config).num_kv_heads
    found = {key: (t / len(windows)).sqrt().view(heads, -1).mean(-1).cpu() for key, t in total.items()}
    return {i: s._replace(fisher={k: found[i, k] for k in SIDES if (i, k) in found}) for i, s in statistics.items()}


def spread(statistics: Mapping[int, LayerStatistics]) -> dict[Side, float]:
    """Largest over least variance of a head's dimensions after RoPE, by side: the median over all heads."""

    def ratios(total: Tensor, outer: Tensor, tokens: int) -> Tensor:
        variance = moments.covariance(total, outer, tokens).diagonal(dim1=1, dim2=2)
        return variance.amax(-1) / variance.amin(-1)

    seen = [s.moments for s in statistics.values()]
    k = [ratios(m.k_sum, m.k_outer, m.tokens) for m in seen]
    v = [ratios(m.v_sum, m.v_outer, m.tokens) for m in seen]
    return {"k": float(torch.cat(k).median()), "v": float(torch.cat(v).median())}


def projections(model: Any) -> list[tuple[int, Side, nn.Linear]]:
    """(layer, side, module) of the linear layers that make keys and values, where they are modules of their own."""
    return [
        (module.layer_idx, side, getattr(module, NAMES[side]))
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and all(isinstance(getattr(module, name, None), nn.Linear) for name in NAMES.values())
        for side in SIDES
    ]


@contextmanager
def watched_projections(model: Any, fn: Any) -> Iterator[None]:
    """Inside the context ``fn(layer, side, y)`` sees every projection's output y [..., H * head_dim] without its bias.

    What it returns, if not None, takes y's place, and the bias is added again.
    """

    def hook(layer_idx: int, side: Side) -> Any:
        def after(module: nn.Linear, inputs: Any, output: Tensor) -> Tensor | None:
            bias = 0 if module.bias is None else module.bias
            changed = fn(layer_idx, side, output - bias)
            return None if changed is None else changed.to(output.dtype) + bias

        return after

    hooks = [module.register_forward_hook(hook(i, side)) for i, side, module in projections(model)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _nothing(num_kv_heads: int, head_dim: int, device: torch.device) -> LayerStatistics:
    zero = torch.zeros(num_kv_heads, head_dim, device=device)
    return LayerStatistics(moments.new_moments(num_kv_heads, head_dim, device), zero, zero, {}, {})


def _amax(x: Tensor) -> Tensor:
    return x.abs().amax((0, 2)).float()
