# SPDX-License-Identifier: Apache-2.0
"""From a choice of tiers to something that can be scored and saved: bases solved for it, on the moments that are there.

In: a model, its moments, layouts by layer. Out: ``LayerProjector`` by layer, and the transform that scoring attends through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from vllm_kvsplice.calibration.calibrate import solve_layers
from vllm_kvsplice.calibration.hf_attention import Transform
from vllm_kvsplice.calibration.moments import Moments
from vllm_kvsplice.calibration.presets import Recipe, load_preset, preset_names, resolve
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import LayerProjector, Projector, build_metadata
from vllm_kvsplice.scoring.hf_engine import Codec
from vllm_kvsplice.tuning.allocate import Point
from vllm_kvsplice.tuning.candidates import recipe_of

Layers = dict[int, LayerProjector]


def solver(model: Any, seen: Mapping[int, Moments], base: Recipe) -> Callable[[Mapping[int, LatentLayout]], Layers]:
    """Bases for layouts by layer; a layer is solved once per layout."""

    @cache
    def solve(layer_idx: int, layout: LatentLayout) -> LayerProjector:
        return solve_layers(model, {layer_idx: seen[layer_idx]}, layout, recipe_of(base, layout))[layer_idx]

    return lambda layouts: {i: solve(i, layout) for i, layout in layouts.items()}


def layouts_of(point: Point, indices: list[int]) -> dict[int, LatentLayout]:
    """The layouts of a point by layer; ``indices`` are the layers in the point's order."""
    pairs = zip(indices, point.layers, strict=True)
    return {i: LatentLayout.of(sum(n for _, n in p.k.tiers), p.k.tiers, p.v.tiers) for i, p in pairs}


def preset_layers(model: Any, seen: Mapping[int, Moments], head_dim: int) -> dict[str, Layers]:
    """The installed presets that compress anything, each solved on the same moments."""
    found = {}
    for name in preset_names():
        layout, recipe = resolve(name, head_dim)
        if not (load_preset(name).k.untouched and load_preset(name).v.untouched):
            found[name] = solve_layers(model, dict(seen), layout, recipe)
    return found


def transform(model: Any, layers: Layers) -> Transform:
    """What a reader of the cache sees, see ``hf_engine``."""
    return Codec(Projector(build_metadata(model.config, "tuned"), layers), model.dtype)
