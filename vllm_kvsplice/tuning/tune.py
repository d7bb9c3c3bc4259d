# SPDX-License-Identifier: Apache-2.0
"""From a model and a budget to a projector file whose layers differ.

In: a ``TuneRequest``. ``texts`` keeps calibration and verification apart, ``sensitivity`` prices every way to store a side
of a layer, ``allocate`` deals the bytes, ``verify`` scores for real and ``search`` says which point next. Out: the result
as a dict, which ``report`` prints and ``plot`` draws, and the projector.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vllm_kvsplice import __version__
from vllm_kvsplice.calibration import calibrate
from vllm_kvsplice.calibration.hf_attention import load_model
from vllm_kvsplice.calibration.moments import Moments
from vllm_kvsplice.calibration.presets import load_preset
from vllm_kvsplice.calibration.texts import Text, special_prefix, token_windows
from vllm_kvsplice.codec.fingerprint import model_shape, shown_name
from vllm_kvsplice.codec.layout import SIDES
from vllm_kvsplice.codec.projector import Calibration, Projector, build_metadata
from vllm_kvsplice.scoring.evaluate import cut_windows
from vllm_kvsplice.scoring.plan import layer_windows
from vllm_kvsplice.scoring.results import check_writable
from vllm_kvsplice.tuning import allocate, codecs, report, search, sensitivity, texts, trials, verify
from vllm_kvsplice.tuning.allocate import Point
from vllm_kvsplice.tuning.candidates import tier_plans
from vllm_kvsplice.tuning.report import Facts
from vllm_kvsplice.tuning.trials import Bench

BASE_PRESET = "near_lossless"  # whose bases and metrics are used; its tiers are not
SENSITIVITY_TOKENS = 8192  # of calibration text that gradients are taken over
FEW_WINDOWS = 4  # or a quarter of all: enough to compare codecs on equal tokens
STAGES = ("moments", "sensitivity", "verification", "comparison")


@dataclass(frozen=True)
class TuneRequest:
    """One tuning, for exactly one of ``budget_ppl`` (percent), ``budget_kld`` (nats per token) and ``target_ratio`` (K+V).

    ``text``, ``dataset`` and ``verify_text`` as in ``texts.choose``. ``samples`` and ``seq_len`` as in calibration;
    ``windows``: of verification text, 0 is all of it. ``even_layers`` gives all layers pages of one size, which models
    with several attention windows get anyway. ``fast``: only plans that decode reads fastest, at a little more loss.
    """

    model: str
    out: str | None = None
    text: str | None = None
    dataset: str | None = None
    verify_text: str | None = None
    budget_ppl: float | None = None
    budget_kld: float | None = None
    target_ratio: float | None = None
    even_layers: bool = False
    fast: bool = False
    samples: int = 32
    windows: int = 12
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


def run(request: TuneRequest) -> dict[str, Any]:
    """Tune, save to ``request.out`` if there is one, and report; raises KVSpliceError on a bad request."""
    budget = search.budget_of(request.budget_ppl, request.budget_kld, request.target_ratio)
    if request.out:
        check_writable(request.out, "--out")
    text, held_out = texts.choose(request.text, request.dataset, request.verify_text)
    model, tokenizer = load_model(request.model, request.device, request.dtype)
    seq_len = calibrate.choose_seq_len(model.config, request.seq_len)
    sample = token_windows(text, tokenizer, seq_len, request.samples, request.seed)
    windows = _verification(held_out, tokenizer, seq_len, request.windows)
    even = request.even_layers or len(set(layer_windows(model.config.get_text_config()))) > 1
    clock = [time.perf_counter()]
    seen = calibrate.collect(model, sample)
    clock.append(time.perf_counter())
    front, uniform = fronts(model, sample, seen, even, request.seed, request.fast)
    clock.append(time.perf_counter())
    solve = codecs.solver(model, seen, load_preset(BASE_PRESET))
    few = min(len(windows), max(FEW_WINDOWS, len(windows) // 4))
    bench = Bench(model, solve, sorted(seen), windows, few, verify.baseline(model, windows), front)
    chosen, factor = trials.choose(bench, budget)
    clock.append(time.perf_counter())
    presets = codecs.preset_layers(model, seen, model_shape(model.config).head_dim)
    rivals = trials.compare(bench, chosen, uniform, presets)
    clock.append(time.perf_counter())
    calibration = Calibration(
        text=text.name,
        text_sha256=text.sha256,
        tokens=sample.numel(),
        samples=len(sample),
        seq_len=seq_len,
        seed=request.seed,
    )
    seconds = {stage: b - a for stage, (a, b) in zip(STAGES, pairwise(clock), strict=True)}
    found = report.result(
        Facts(shown_name(request.model), budget, held_out, even, chosen, factor, rivals, calibration, seconds), bench
    )
    if request.out:
        _save(request, bench, chosen, calibration, report.quality(found))
    return found


def fronts(
    model: Any, sample: Tensor, seen: Mapping[int, Moments], even: bool, seed: int, fast: bool = False
) -> tuple[list[Point], list[Point]]:
    """The front of what the tuner may choose, and that of one layout for all layers, from the calibration text alone."""
    head_dim = model_shape(model.config).head_dim
    plans = {side: tier_plans(head_dim, side, fast) for side in SIDES}
    few = sample[: max(1, SENSITIVITY_TOKENS // sample.shape[1])]
    options = sensitivity.measure(model, few, seen, load_preset(BASE_PRESET), plans, seed)
    layers = [(options[i, "k"], options[i, "v"]) for i in sorted(seen)]
    front = allocate.even_front(layers) if even else allocate.free_front(layers)
    return [p for p in front if p.loss > 0], allocate.uniform_front(layers)


def _verification(text: Text, tokenizer: Any, seq_len: int, count: int) -> Tensor:
    ids = list(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids)
    return torch.tensor(cut_windows(ids, special_prefix(tokenizer), seq_len, count))


def _save(request: TuneRequest, bench: Bench, chosen: Point, calibration: Calibration, quality: dict[str, Any]) -> None:
    metadata = build_metadata(
        bench.model.config,
        "tuned",
        model_name=shown_name(request.model),
        recipe=load_preset(BASE_PRESET).model_dump(mode="json", exclude={"k": {"tiers"}, "v": {"tiers"}}),
        calibration=calibration,
        versions={"kvsplice": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        quality=quality,
    )
    calibrate.save(Projector(metadata, bench.layers(chosen)), Path(str(request.out)))
