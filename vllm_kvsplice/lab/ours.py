# SPDX-License-Identifier: Apache-2.0
"""KVSplice's own codecs: the installed presets, calibrated for the comparison, and projector files that were given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_kvsplice.calibration.calibrate import solve_layers
from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.calibration.moments import new_moments
from vllm_kvsplice.calibration.presets import Recipe, layout_of, load_preset, preset_names
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Projector, build_metadata
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.codec import Attach, Bytes, Codec, Geometry, Needs, Setup
from vllm_kvsplice.scoring.hf_engine import Codec as Simulation

FAMILY = "KVSplice"


def preset_codec(name: str) -> Codec:
    """A preset by name, or a TOML file."""
    return recipe_codec(name, load_preset(name))


def recipe_codec(name: str, recipe: Recipe) -> Codec:
    """A recipe, solved on the comparison's calibration text."""

    def count(geometry: Geometry) -> Bytes:
        return layout_bytes({0: layout_of(recipe, geometry.head_dim)})

    def prepare(setup: Setup) -> Attach:
        layout = layout_of(recipe, setup.geometry.head_dim)
        heads, dims = setup.geometry.num_kv_heads, setup.geometry.head_dim
        unseen = {i: new_moments(heads, dims) for i in range(setup.geometry.num_layers)}  # enough for fixed bases
        seen = {i: s.moments for i, s in setup.statistics.items()} or unseen
        layers = solve_layers(setup.model, seen, layout, recipe)
        return _attach(Projector(build_metadata(setup.model.config, name), layers), setup)

    needs: Needs = "calibration" if recipe.needs_text else "nothing"
    return Codec(name, FAMILY, "this project", count, prepare, needs=needs)


def file_codec(path: str, projector: Projector) -> Codec:
    """A projector that was read from a file; its calibration is its own affair, so it is scored once."""
    layouts = {i: layer.layout for i, layer in projector.layers.items()}

    def prepare(setup: Setup) -> Attach:
        projector.verify(setup.model.config)
        missing = set(range(setup.geometry.num_layers)) - set(layouts)
        if missing:
            raise KVSpliceError(f"{path} has no layer {min(missing)}: make it again with `kvsplice calibrate MODEL`.")
        return _attach(projector, setup)

    return Codec(f"file:{Path(path).name}", FAMILY, "this project", lambda _: layout_bytes(layouts), prepare)


def layout_bytes(layouts: Mapping[int, LatentLayout]) -> Bytes:
    """Mean over layers."""
    sides = [(layout.side_bytes("k"), layout.side_bytes("v")) for layout in layouts.values()]
    return Bytes(*(sum(side) / len(sides) for side in zip(*sides, strict=True)))


def _attach(projector: Projector, setup: Setup) -> Attach:
    simulation = Simulation(projector, setup.model.dtype)
    return lambda model, run: transformed_kv(model, simulation)


def codecs() -> list[Codec]:
    """All installed presets."""
    return [preset_codec(name) for name in preset_names()]
