# SPDX-License-Identifier: Apache-2.0
"""What a projector holds and what it saves, from the file alone.

In: a projector file (or None for the calibration-free codec). Out: ``describe``, a dict that ``kvsplice inspect``
prints and that scoring results carry, and ``served_layouts``, the layout of every attention layer of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_kvsplice.codec.fingerprint import ModelShape
from vllm_kvsplice.codec.layout import LatentLayout, ratios
from vllm_kvsplice.codec.projector import Projector, default_layer
from vllm_kvsplice.scoring.results import file_digest, table

DEFAULT_PRESET = "int8"  # what serving uses where there is no projector


def inspect(path: str) -> dict[str, Any]:
    """Facts of one file: keys bytes_per_token_head, ratio {k, v, kv}, layers, fingerprint and provenance; raises
    KVSpliceError if it is not a sound projector."""
    projector = Projector.load(path)
    return {"file": path} | describe(projector, projector.metadata.model, path)


def describe(projector: Projector | None, shape: ModelShape, path: str | None) -> dict[str, Any]:
    """The same facts for a projector in memory, or for the calibration-free codec of a model."""
    layouts = served_layouts(projector, shape)
    meta = projector.metadata if projector else None
    facts: dict[str, Any] = {
        "preset": meta.preset if meta else DEFAULT_PRESET,
        "bytes_per_token_head": mean_bytes(layouts.values()),
        "ratio": ratios(layouts.values())._asdict(),
        "layers": [_layer(i, layout, projector) for i, layout in sorted(layouts.items())],
        "fingerprint": {"digest": shape.digest} | shape.model_dump(),
    }
    if meta:
        facts |= meta.model_dump(
            mode="json", include={"format", "model_name", "recipe", "calibration", "versions", "quality"}
        )
    return facts | ({"sha256": file_digest(path)} if path else {})


def served_layouts(projector: Projector | None, shape: ModelShape) -> dict[int, LatentLayout]:
    """The layout of every layer: the projector's, dense 16-bit where it names none; without one, the default codec's."""
    wide = [(16, shape.head_dim)]
    dense = LatentLayout.of(shape.head_dim, wide, wide)
    if projector is None:
        return dict.fromkeys(range(shape.num_hidden_layers), default_layer(shape.head_dim, 1).layout)
    found = {i: layer.layout for i, layer in projector.layers.items()}
    return {i: found.get(i, dense) for i in range(shape.num_hidden_layers)}


def mean_bytes(layouts: Iterable[LatentLayout]) -> float:
    """All-in bytes per token and KV head, K and V together, mean over layers."""
    sizes = [layout.bytes_per_token_head for layout in layouts]
    return sum(sizes) / len(sizes)


def summary(layouts: Iterable[LatentLayout]) -> str:
    """The tiers in words, with the number of layers that have them where they differ."""
    counts: dict[str, int] = {}
    for layout in layouts:
        counts[str(layout)] = counts.get(str(layout), 0) + 1
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} layers {text}" for text, n in counts.items())


def inspect_table(facts: dict[str, Any]) -> str:
    """The human form of ``inspect``."""
    model, ratio, calibration = facts["fingerprint"], facts["ratio"], facts["calibration"]
    rows = [["layer", "K tiers", "V tiers", "bytes", "K", "V", "K+V"]]
    for layer in facts["layers"]:
        r = layer["ratio"]
        rows.append(
            [str(layer["layer"]), _tiers(layer["k"]), _tiers(layer["v"]), str(layer["bytes_per_token_head"])]
            + [f"{r[side]:.2f} x" for side in ("k", "v", "kv")]
        )
    text = (
        "none"
        if not calibration
        else (
            f"{calibration['text']}, {calibration['tokens']:,} tokens, seed {calibration['seed']}, sha256 {calibration['text_sha256'][:16]}"
        )
    )
    lines = [
        f"{facts['file']}  format {facts['format']}, preset {facts['preset']}, sha256 {facts['sha256'][:16]}",
        f"model {facts['model_name'] or model['model_type']}, fingerprint {model['digest']}: "
        f"{model['num_hidden_layers']} layers, {model['num_kv_heads']} KV heads of {model['head_dim']}",
        f"calibration text: {text}",
        f"made by: {', '.join(f'{k} {v}' for k, v in facts['versions'].items()) or 'not recorded'}",
        f"bytes per token and KV head {facts['bytes_per_token_head']:.1f}; all-in ratio against 16 bit: "
        f"K {ratio['k']:.2f} x, V {ratio['v']:.2f} x, K+V {ratio['kv']:.2f} x",
        f"measured quality: {facts['quality'] or 'none in the file'}",
        "",
        table(rows),
    ]
    return "\n".join(lines)


def _layer(index: int, layout: LatentLayout, projector: Projector | None) -> dict[str, Any]:
    data = layout.to_json()
    return {
        "layer": index,
        "compressed": projector is None or index in projector.layers,
        "k": data["k"],
        "v": data["v"],
        "bytes_per_token_head": layout.bytes_per_token_head,
        "ratio": ratios([layout])._asdict(),
    }


def _tiers(pairs: list[list[int]]) -> str:
    return " + ".join(f"{dims} x {bits} bit" for bits, dims in pairs)
