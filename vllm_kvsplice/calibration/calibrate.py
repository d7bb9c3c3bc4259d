# SPDX-License-Identifier: Apache-2.0
"""From a model and a text to a projector file.

In: a ``CalibrateRequest``. ``texts`` cuts the windows, ``hf_attention`` shows the keys, values and queries,
``moments`` sums them up, ``presets`` says what to store and ``bases`` solves for it. Out: a saved ``Projector``,
which the vLLM backend serves with and ``kvsplice eval`` scores.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from torch import Tensor

from vllm_kvsplice import __version__
from vllm_kvsplice.calibration import moments
from vllm_kvsplice.calibration.hf_attention import load_model, output_weights, transformed_kv
from vllm_kvsplice.calibration.moments import Moments
from vllm_kvsplice.calibration.presets import Recipe, SideRecipe, load_preset, resolve, shown_preset
from vllm_kvsplice.calibration.texts import Text, load_text, token_windows
from vllm_kvsplice.codec import bases
from vllm_kvsplice.codec.fingerprint import ModelShape, model_shape, shown_name
from vllm_kvsplice.codec.layout import LatentLayout, Side
from vllm_kvsplice.codec.projector import Basis, Calibration, LayerProjector, Metadata, Projector, build_metadata
from vllm_kvsplice.errors import KVSpliceError

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class CalibrateRequest:
    """One calibration. ``text`` is a file, ``dataset`` "wikitext2" or "c4", neither the built-in English.

    ``seq_len`` None is 2048 or what the model can hold; ``samples`` is the most windows read. ``rank``, ``v_bits`` and
    ``k_bits`` override the preset as in ``presets.resolve``; ``metric_k`` ("query-aware" or "plain"), ``metric_v``
    ("output-aware" or "plain") and ``equalise`` ("gamma", "rotate", "sigma" or "none", both sides) override its choices.
    """

    model: str
    out: str
    text: str | None = None
    dataset: str | None = None
    preset: str = "near_lossless"
    samples: int = 64
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    rank: int | None = None
    v_bits: int | None = None
    k_bits: int | None = None
    metric_k: str | None = None
    metric_v: str | None = None
    equalise: str | None = None


def run(request: CalibrateRequest) -> Projector:
    """Calibrate and save to ``request.out``; equal requests give equal bytes. Raises KVSpliceError on a bad one."""
    out = Path(request.out)
    if out.is_dir():
        raise KVSpliceError(
            f"--out {out} is a folder: give the path of the file to write, for example {out}/kvsplice/kvsplice.safetensors."
        )
    _check_out(out)
    _with_choices(load_preset(request.preset), request)  # what is wrong with these is told before the model loads
    text = load_text(request.text, request.dataset)
    model, tokenizer = load_model(request.model, request.device, request.dtype)
    head_dim = model_shape(model.config).head_dim
    layout, recipe = resolve(request.preset, head_dim, request.rank, request.v_bits, request.k_bits)
    recipe = _with_choices(recipe, request)
    windows, calibration = torch.zeros(1, 2, dtype=torch.int64), None  # enough to see which layers there are
    if recipe.needs_text:
        windows, calibration = _read(text, tokenizer, choose_seq_len(model.config, request.seq_len), request)
    layers = solve_layers(model, collect(model, windows), layout, recipe)
    projector = Projector(_metadata(model, request, layout, recipe, calibration), layers)
    save(projector, out)
    return projector


def _read(text: Text, tokenizer: Any, seq_len: int, request: CalibrateRequest) -> tuple[Tensor, Calibration]:
    """Windows of token ids [n, seq_len] and their description."""
    windows = token_windows(text, tokenizer, seq_len, request.samples, request.seed)
    return windows, Calibration(
        text=text.name,
        text_sha256=text.sha256,
        tokens=windows.numel(),
        samples=len(windows),
        seq_len=seq_len,
        seed=request.seed,
    )


def _metadata(
    model: Any, request: CalibrateRequest, layout: LatentLayout, recipe: Recipe, calibration: Calibration | None
) -> Metadata:
    return build_metadata(
        model.config,
        shown_preset(request.preset),
        model_name=shown_name(request.model),
        recipe=recipe.model_dump(mode="json") | {"bytes_per_token_head": layout.bytes_per_token_head},
        calibration=calibration,
        versions={"kvsplice": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


def choose_seq_len(config: Any, wanted: int | None) -> int:
    """Tokens per window: what is wanted, else min(2048, the model's positions); KVSpliceError if it has fewer."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    if wanted is None:
        return min(DEFAULT_SEQ_LEN, longest)
    if wanted > longest:
        raise KVSpliceError(f"--seq-len {wanted} does not fit the model: expected at most {longest} tokens.")
    return wanted


@torch.no_grad()
def collect(model: Any, windows: Tensor) -> dict[int, Moments]:
    """Moments of every attention layer over windows of token ids [n, seq_len], one window at a time, on the CPU."""
    shape = model_shape(model.config)
    seen: dict[int, Moments] = {}

    def watch(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer_idx not in seen:
            _check_heads(layer_idx, k, v, shape)
            seen[layer_idx] = moments.new_moments(shape.num_kv_heads, shape.head_dim, k.device)
        seen[layer_idx] = moments.add_batch(seen[layer_idx], q, k, v)
        return k, v

    body = model.base_model  # without the vocabulary's logits
    with transformed_kv(body, watch):
        for window in _progress(windows, len(windows)):
            body(window[None].to(model.device), use_cache=False)
    on_cpu = {i: Moments(m.tokens, *(t.cpu() for t in m[1:])) for i, m in sorted(seen.items())}
    for i, m in on_cpu.items():
        if not all(bool(t.isfinite().all()) for t in m[1:]):
            raise KVSpliceError(
                f"layer {i} gave keys or values that are not finite in {model.dtype}: pass --dtype float32."
            )
    return on_cpu


def solve_layers(
    model: Any, seen: dict[int, Moments], layout: LatentLayout, recipe: Recipe
) -> dict[int, LayerProjector]:
    """Bases of every layer from its moments."""
    weigh_output = recipe.v.metric == "output-aware" and not recipe.v.untouched
    outputs = output_metrics(model, seen) if weigh_output else {}
    layers = {}
    for i, m in seen.items():
        metrics = {"plain": None, "query-aware": m.q_outer, "output-aware": outputs.get(i)}
        k = _basis("k", m.k_sum, m.k_outer, m.tokens, recipe.k, layout, metrics)
        v = _basis("v", m.v_sum, m.v_outer, m.tokens, recipe.v, layout, metrics)
        layers[i] = LayerProjector(layout, k, v)
    return layers


def _basis(
    side: Side,
    total: Tensor,
    outer: Tensor,
    tokens: int,
    recipe: SideRecipe,
    layout: LatentLayout,
    metrics: dict[str, Tensor | None],
) -> Basis:
    num_kv_heads, head_dim = total.shape
    if recipe.untouched:
        return Basis.orthogonal(torch.eye(head_dim).expand(num_kv_heads, -1, -1))
    if recipe.basis == "hadamard":
        return Basis.orthogonal(bases.hadamard(head_dim).expand(num_kv_heads, -1, -1))
    metric = metrics[recipe.metric]
    solution = bases.solve(
        moments.mean(total, tokens),
        moments.covariance(total, outer, tokens),
        None if metric is None else bases.blend(metric),
        [(t.bits, t.dims) for t in layout.tiers(side)],
        recipe.equalise,
    )
    return Basis(*(part.float().contiguous() for part in solution))


def output_metrics(model: Any, seen: Mapping[int, Moments]) -> dict[int, Tensor]:
    """``bases.output_metric`` of every layer; KVSpliceError where the model has no output projection that is known."""
    weights, found = output_weights(model), {}
    for i, m in seen.items():
        num_kv_heads, head_dim = m.k_sum.shape
        weight = weights.get(i)
        if weight is None or weight.shape[1] % (num_kv_heads * head_dim):
            raise KVSpliceError(
                f"{type(model).__name__} layer {i} has no output projection that KVSplice knows: calibrate with --metric-v plain."
            )
        found[i] = bases.output_metric(weight.cpu(), num_kv_heads, head_dim)
    return found


def _check_heads(layer_idx: int, k: Tensor, v: Tensor, shape: ModelShape) -> None:
    want = (shape.num_kv_heads, shape.head_dim)
    for name, x in (("K", k), ("V", v)):
        if (x.shape[1], x.shape[3]) != want:
            raise KVSpliceError(
                f"layer {layer_idx} has {x.shape[1]} {name} heads of {x.shape[3]}, its config says {want[0]} of {want[1]}: "
                "models whose layers or sides differ in shape are not supported."
            )


def _with_choices(recipe: Recipe, request: CalibrateRequest) -> Recipe:
    """The recipe with the request's metrics and equalisation."""
    if request.equalise not in (None, *bases.EQUALISE):
        raise KVSpliceError(f"--equalise {request.equalise} is not known: expected {', '.join(bases.EQUALISE)}.")
    sides = {}
    for name, metric, aware in (("k", request.metric_k, "query-aware"), ("v", request.metric_v, "output-aware")):
        if metric not in (None, aware, "plain"):
            raise KVSpliceError(f"--metric-{name} {metric} is not known: expected {aware} or plain.")
        changes = {"metric": metric, "equalise": request.equalise}
        sides[name] = getattr(recipe, name).model_copy(update={key: c for key, c in changes.items() if c is not None})
    return recipe.model_copy(update=sides)


def _progress(windows: Iterable[Tensor], total: int) -> Iterable[Tensor]:
    return track(windows, "calibrating", total=total, console=Console(stderr=True), transient=True)


def save(projector: Projector, out: Path) -> None:
    """Write beside ``out`` and rename, so that no half-written file is ever found there; KVSpliceError if it cannot be."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        projector.save(partial)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise _unwritable(out, getattr(error, "strerror", None) or str(error).splitlines()[0]) from None


def _check_out(out: Path) -> None:
    """Raise KVSpliceError, before the work rather than after it, if a file cannot be written."""
    place = next(p for p in out.absolute().parents if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise _unwritable(out, f"{place} is no folder that you may write to")


def _unwritable(out: Path, why: str) -> KVSpliceError:
    return KVSpliceError(f"--out {out} cannot be written ({why}): give a path that you may write to.")
